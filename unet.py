"""The paper's U-Net with dropout in Keras, its losses, and weights files.

Nothing here reads data files or makes CEAL's decisions.
"""

import contextlib
import functools
import json
import math
import os
import warnings

import h5py
import numpy as np

from utils import LARGEST_SIDE, UserError, in_one_line, open_hdf5, reserve, whole_file


@contextlib.contextmanager
def silent_stderr():
    """Discard all output to the process's stderr, also from C libraries. Exceptions are raised as usual."""
    try:
        kept = os.dup(2)
    except OSError:  # a service may have no stderr
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set it to 0 to see, for example, why no GPU is found
# The Keras settings of other projects must have no effect: those in the environment, and those in ~/.keras/keras.json,
# which Keras does not find here.
for name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[name]
os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
with silent_stderr():  # TensorFlow prints its first messages at any log level
    import keras
    import tensorflow as tf
    from keras import layers

if keras.config.backend() != "tensorflow":
    raise UserError(f"Keras is in use here with {keras.config.backend()}; restart Python and repeat the command")
# For a notebook that has changed them.
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")
keras.config.set_dtype_policy("float32")


def about_tensorflow():
    """TensorFlow's version and the devices that it found, a dict."""
    # The module gives the version, because the package may be called tensorflow-cpu.
    return {"tensorflow": tf.__version__, "devices": [device.name for device in tf.config.list_physical_devices()]}


def print_devices():
    """Print TensorFlow's version and the devices that it found."""
    names = [name.removeprefix("/physical_device:") for name in about_tensorflow()["devices"]]
    print(f"TensorFlow {tf.__version__} found {', '.join(names)}", flush=True)


FREE_MEMORY = "end other programs that use memory (nvidia-smi lists those on a GPU), and give the same command again"
GPU_LIBRARIES = "dnn", "blas", "cuda", "ptxas", "convolution algorithm", "no algorithm worked"  # in error messages
ON_CPU = "or compute on the processor: put CUDA_VISIBLE_DEVICES=-1 before the command"


@contextlib.contextmanager
def tensorflow_errors(remedy=FREE_MEMORY):
    """Turn TensorFlow's errors about memory and a GPU's libraries into a UserError. remedy: for lack of memory."""
    try:
        yield
    except tf.errors.InvalidArgumentError:
        raise
    except (tf.errors.OpError, MemoryError) as error:
        text, reason = str(error).lower(), in_one_line(error)
        short = isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError))
        if short or "out of memory" in text or "failed to allocate" in text:
            raise UserError(f"there is not enough memory; {remedy}")
        if "libdevice" in text:
            raise UserError(f"CUDA's libdevice is missing ({reason}); pip install 'tensorflow[and-cuda]', {ON_CPU}")
        if any(part in text for part in GPU_LIBRARIES):
            raise UserError(
                f"the GPU's libraries failed ({reason}); end other programs on the GPU (nvidia-smi lists them), or "
                f"install the libraries anew (pip install 'tensorflow[and-cuda]'), {ON_CPU}"
            )
        raise


LARGEST_KERNEL = "layers/conv2d_9/vars/0"  # in a weights file: the kernel of bottleneck_b
LEVELS = 4  # the number of times that the network halves its input
# The choices of --precision. In half precision the layers compute in 16 bits; weights, loss and output stay float32.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


# ---------------------------------------------------------------------------------------------------------- the network


MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}  # bits


def kept_units(shape, rate, seed, dtype="float32"):
    """The units that dropout keeps, a random bool tensor. seed: an int tensor (2,).

    They equal `tf.random.stateless_uniform(shape, seed, dtype=dtype) >= rate` on a CPU without XLA, which uses Philox
    and the lowest bits of its numbers. Written out, because XLA uses other bits and other devices other algorithms."""
    bits = tf.random.stateless_uniform(shape, seed, None, None, tf.int32, alg="philox")
    numbers = tf.bitwise.bitwise_and(bits, 2 ** MANTISSA[dtype] - 1)
    return tf.cast(numbers, dtype) / 2 ** MANTISSA[dtype] >= tf.cast(rate, dtype)


class Dropout(layers.Dropout):
    """Dropout with the same masks on every device, with and without XLA. It draws one mask for the whole batch and
    gives each replica its rows, so that training on several devices drops the same units as training on one."""

    def call(self, inputs, training=False):
        if not training:
            return inputs
        seed = tf.cast(tf.math.floormod(self.seed_generator.next(), tf.int32.max - 1), tf.int32)  # as Keras does
        context, shape = tf.distribute.get_replica_context(), tf.shape(inputs)
        first, count = 0, shape[:1]
        if context.num_replicas_in_sync > 1:
            sizes = context.all_gather(count, axis=0)
            first = tf.cumsum(sizes, exclusive=True)[context.replica_id_in_sync_group]
            count = [tf.reduce_sum(sizes)]
        kept = kept_units(tf.concat([count, shape[1:]], 0), self.rate, seed, inputs.dtype.name)
        kept = tf.ensure_shape(kept[first : first + shape[0]], inputs.shape)
        return tf.where(kept, inputs * tf.cast(1 / (1 - self.rate), inputs.dtype), tf.zeros([], inputs.dtype))


def build_unet(height, width, channels=1, filters=32, dropout=0.5, precision="float32", initializer="GlorotUniform"):
    """The network of the paper's published code.

    Input float32 (N, height, width, channels), normalised; output float32 (N, height, width, 1), the probability
    of lesion. Two 3x3 ReLU convolutions per level with `filters` to 16 * `filters` channels, 2x2 max-pooling,
    nearest up-sampling then concatenation, and one dropout layer after the bottleneck. 7,846,081 parameters for one
    channel and 32 filters. precision: a key of PRECISIONS, the type in which the layers compute. initializer: the
    name of a Keras initializer.
    Raises ValueError if height or width cannot be halved four times.
    """
    if height % 2**LEVELS or width % 2**LEVELS or min(height, width) < 2**LEVELS:
        raise ValueError(f"height and width must be multiples of {2**LEVELS}, not {height} and {width}")
    policy = PRECISIONS[precision]

    def convolutions(x, level, name):
        for letter in "ab":
            options = {"padding": "same", "activation": "relu", "kernel_initializer": initializer, "dtype": policy}
            x = layers.Conv2D(filters * 2**level, 3, name=f"{name}_{letter}", **options)(x)
        return x

    x = inputs = keras.Input((height, width, channels), name="image")
    skips = []
    for level in range(LEVELS):
        x = convolutions(x, level, f"encoder_{level}")
        skips.append(x)
        x = layers.MaxPooling2D(2, dtype=policy, name=f"down_{level}")(x)
    x = convolutions(x, LEVELS, "bottleneck")
    x = Dropout(dropout, dtype=policy, name="dropout")(x)
    for level in reversed(range(LEVELS)):
        x = layers.UpSampling2D(2, dtype=policy, name=f"up_{level}")(x)
        x = layers.Concatenate(dtype=policy, name=f"join_{level}")([x, skips[level]])
        x = convolutions(x, level, f"decoder_{level}")
    # Always float32, because the loss and the variance need it.
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="probability")(x)
    return keras.Model(inputs, outputs, name="unet")


def halves(model):
    """Split the network of `build_unet` at its dropout, rearranged to avoid repeated work. Returns two functions:
    `encode`, images -> (bottleneck, rest), and `decode`, (bottleneck, rest) -> probabilities.

    1. The first convolution of a decoder level is linear in its two inputs. The half for the skip connection does not
       depend on the bottleneck, so `encode` computes it.
    2. Nearest up-sampling by 2 and then a 3x3 convolution equal one 4x4 transposed convolution with a stride of 2. The
       large map is never made, and only 4 of 9 multiplications remain.
    """
    skips = [model.get_layer(f"encoder_{level}_b").output for level in range(LEVELS)]
    encoder = keras.Model(model.input, [model.get_layer("dropout").input, *skips])
    first, second = ([model.get_layer(f"decoder_{n}_{letter}") for n in range(LEVELS)] for letter in "ab")

    def encode(images):
        bottleneck, *skips = encoder(images)
        dtype, rest = bottleneck.dtype, []
        for layer, skip in zip(first, skips):
            up, beside = tf.split(layer.kernel, [-1, skip.shape[-1]], axis=2)
            half = tf.nn.conv2d(skip, tf.cast(beside, dtype), 1, "SAME")
            rest.append((tf.cast(_transposed_kernel(up), dtype), tf.nn.bias_add(half, tf.cast(layer.bias, dtype))))
        return bottleneck, rest

    def decode(x, rest):
        for (kernel, half), layer in reversed(list(zip(rest, second))):
            x = layer(tf.nn.relu(tf.nn.conv2d_transpose(x, kernel, tf.shape(half), 2, "SAME") + half))
        return model.get_layer("probability")(x)

    return encode, decode


def _transposed_kernel(kernel):
    """Convert a kernel (3, 3, in, out) for use after nearest up-sampling by 2 to a transposed one (4, 4, out, in)."""
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    summed = tf.add_n([tf.pad(kernel, [[r, 1 - r], [c, 1 - c], [0, 0], [0, 0]]) for r, c in corners])
    return tf.transpose(summed[::-1, ::-1], [0, 1, 3, 2])


def count_parameters(channels, filters):
    """The number of weights of `build_unet` with these settings, computed without building the network."""
    widths = [filters * 2**level for level in range(LEVELS + 1)]
    encoder = zip([channels, *widths], widths)
    decoder = ((3 * width, width) for width in widths[:-1])  # width from the skip connection, 2 * width from below
    convolutions = sum(9 * (inputs + width) * width + 2 * width for inputs, width in [*encoder, *decoder])
    return convolutions + filters + 1


def unet_settings(model):
    """The arguments of `build_unet` that build this network again, a dict. Raises ValueError for other networks."""
    _, height, width, channels = model.input_shape
    dropout = model.get_layer("dropout")
    (precision,) = [name for name, policy in PRECISIONS.items() if policy == dropout.dtype_policy.name]
    first = model.get_layer("encoder_0_a")
    sizes = {"height": height, "width": width, "channels": channels, "filters": first.filters}
    initializer = type(first.kernel_initializer).__name__
    return {**sizes, "dropout": dropout.rate, "precision": precision, "initializer": initializer}


# ----------------------------------------------------------------------------------------------------------- the losses


def dice_coefficient(y_true, y_pred, smooth=1.0):
    """Soft Dice coefficient, pooled over all pixels of the batch, as published; a float32 scalar in (0, 1].

    With several devices it covers the whole batch, not the share of one device.
    """
    y_true = tf.reshape(tf.cast(y_true, tf.float32), [-1])
    y_pred = tf.reshape(tf.cast(y_pred, tf.float32), [-1])
    overlap, sizes = tf.reduce_sum(y_true * y_pred), tf.reduce_sum(y_true) + tf.reduce_sum(y_pred)
    overlap, sizes = _of_all_devices([overlap, sizes])
    return (2.0 * overlap + smooth) / (sizes + smooth)


def _of_all_devices(sums):
    """Add up over all devices a list of sums, each over the device's share of the batch."""
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce("SUM", sums) if replica and replica.num_replicas_in_sync > 1 else sums


@keras.saving.register_keras_serializable("ceal")  # so that a compiled model can be cloned
def dice_loss(y_true, y_pred):
    """The published loss: minus the soft Dice coefficient of the batch. With several devices each returns an equal
    part, because Keras adds up scalar losses."""
    return -dice_coefficient(y_true, y_pred) / tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable("ceal")
def dice_bce_loss(y_true, y_pred):
    """The published loss plus the mean binary cross-entropy of the batch, whose gradient does not vanish where the
    network is sure and wrong. With the published loss alone it may predict only skin and stay in that state."""
    entropies = keras.losses.binary_crossentropy(y_true, y_pred)
    (count,) = _of_all_devices([tf.cast(tf.size(entropies), tf.float32)])
    return dice_loss(y_true, y_pred) + tf.reduce_sum(entropies) / count


LOSSES = {"dice": dice_loss, "dice_bce": dice_bce_loss}


# ------------------------------------------------------------------------------------------------------ several devices


def share_out(strategy, *batch):
    """Split each array of the batch among the strategy's devices; the shares differ by at most one image."""
    devices = strategy.num_replicas_in_sync
    if devices == 1:
        return batch
    edges = [len(batch[0]) * device // devices for device in range(devices + 1)]

    def share(values):
        def of_device(context):
            device = context.replica_id_in_sync_group
            return tf.constant(values[edges[device] : edges[device + 1]])

        return strategy.experimental_distribute_values_from_function(of_device)

    return tuple(map(share, batch))


# -------------------------------------------------------------------------------------------------------- weights files


def save_unet(model, path, mean, std, dtype="float32"):
    """Write the weights to `path` (*.weights.h5, standard Keras) and the settings to its attribute `unet`: height,
    width, channels, filters, dropout, and the normalisation's mean and std, each a list with a float per channel.

    dtype: `float16` stores the large kernels in half precision, as in weights/; the loaded network is float32 again."""
    settings = {**unet_settings(model), "mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    del settings["precision"], settings["initializer"]  # they belong to the training
    if dtype == "float16":
        half = keras.models.clone_model(model, clone_function=_stored_in_half)
        half.set_weights(model.get_weights())
        model = half
    save_weights(model, path, unet=json.dumps(settings))


def _stored_in_half(layer):
    """The same layer, in float16 if it has many weights. The finest levels have few; they decide where contours lie."""
    many = layer.count_params() > 50_000
    return type(layer).from_config({**layer.get_config(), "dtype": "float16" if many else "float32"})


def save_weights(model, path, **attributes):
    """Write weights, optimizer's state (if any) and HDF5 attributes to `path` (*.weights.h5), all or nothing."""
    optimizer = getattr(model, "optimizer", None)  # a network that was not compiled has none
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    with whole_file(path) as partial:
        reserve(partial, sum(4 * math.prod(variable.shape) + 4096 for variable in variables))
        with without_locks():
            model.save_weights(partial)
        with h5py.File(partial, "a", locking=False) as file:
            file.attrs.update(attributes)


@contextlib.contextmanager
def without_locks():
    """Let Keras open HDF5 files without locks, because some disks have none. Our files are only replaced as a whole."""
    kept, h5py.File = h5py.File, functools.partial(h5py.File, locking=False)
    try:
        yield
    finally:
        h5py.File = kept


def load_weights(model, path):
    """Like `model.load_weights`, but raises UserWarning if the file lacks something."""
    with warnings.catch_warnings(), without_locks():
        warnings.simplefilter("error", UserWarning)  # otherwise Keras continues without it
        model.load_weights(path)


def _checked_settings(path):
    """The settings that `save_unet` wrote to a weights file, a dict. Raises ValueError, or another error that
    `load_unet` catches, if they are impossible, before they can cause a large network to be built."""
    if not os.path.isfile(path) or not str(path).endswith(".weights.h5"):
        raise ValueError("Keras needs a file whose name ends in .weights.h5")
    with open_hdf5(path) as file:
        settings, kernel = json.loads(file.attrs["unet"]), file[LARGEST_KERNEL]
        stored = getattr(kernel, "dtype", None)
    sizes = [settings[name] for name in ("height", "width", "channels", "filters")]
    height, width, channels, filters = sizes
    whole = all(type(size) is int and size > 0 for size in sizes)
    if not whole or max(height, width) > LARGEST_SIDE or channels not in (1, 3):
        raise ValueError(f"impossible height, width, channels or filters: {sizes}")
    if stored not in (np.float16, np.float32):
        raise ValueError(f"weights of type {stored}, not float16 or float32")
    if stored.itemsize * count_parameters(channels, filters) > os.path.getsize(path):
        raise ValueError(f"the file is too small for {filters} filters")
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"impossible dropout: {settings['dropout']}")
    normalisation = np.array([settings["mean"], settings["std"]], float)
    if normalisation.shape != (2, channels) or not np.isfinite(normalisation).all() or normalisation[1].min() <= 0:
        raise ValueError("impossible mean or std")
    return settings


def load_unet(path, precision="float32"):
    """Read a file of `save_unet`. Returns (model, settings); `settings` is the dict in the file's attribute.

    precision: a key of PRECISIONS, the type in which the network computes. Raises UserError if the file is missing, is
    not a weights file of this project, or is damaged. Only data are read: code in a file is never run.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such weights file; train.py writes iteration_KK/model.weights.h5")
    try:
        settings = _checked_settings(path)
        sizes = {k: settings[k] for k in ("height", "width", "channels", "filters", "dropout")}
        model = build_unet(**sizes, precision=precision)
        load_weights(model, path)
        if not all(np.isfinite(values).all() for values in model.get_weights()):
            raise ValueError("some weights are not finite, because their training diverged")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError, UserWarning) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: not a weights file of train.py ({reason}); give the model.weights.h5 of a run")
    return model, settings
