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

from devices import keras, tf
from utils import LARGEST_SIDE, UserError, in_one_line, open_hdf5, reserve, whole_file

layers = keras.layers


LARGEST_KERNEL = "layers/conv2d_9/vars/0"  # in a weights file: the kernel of bottleneck_b
LEAST_CONTRAST = 0.05  # of an image, in deviations of all images; what is below is not strengthened to a full contrast
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


def kept_units_of_images(shape, rate, seeds):
    """The `kept_units` of many images at once, bool (N, *shape), with the same result. seeds: int64 (N, 2).

    Written out because TensorFlow draws with one seed at a time, which is fast on a CPU only."""
    key, counter = _philox(*_halves_of(seeds[:, :1]), *_halves_of(seeds[:, 1:]), 0x3EC8F720, 0x02461E29)
    count = math.prod(shape)
    blocks = tf.range(-(-count // 4), dtype=tf.int64) + tf.zeros_like(seeds[:, :1])  # (N, a block of four numbers)
    first, second = _philox(blocks, tf.zeros_like(blocks), *(half + 0 * blocks for half in counter), *key)
    bits = tf.reshape(tf.stack([*first, *second], -1), [tf.shape(seeds)[0], -1])[:, :count]
    numbers = tf.bitwise.bitwise_and(bits, 2 ** MANTISSA["float32"] - 1)
    kept = tf.cast(numbers, tf.float32) / 2 ** MANTISSA["float32"] >= rate
    return tf.reshape(kept, [-1, *shape])


def _philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 (Salmon et al., 2011), the generator of tf.random. Counters and key are int64 tensors of numbers
    below 2**32. Returns two pairs of such tensors."""
    for _ in range(10):
        (low0, high0), (low1, high1) = _halves_of(0xD2511F53 * c0), _halves_of(0xCD9E8D57 * c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c0, c1), (c2, c3)


def _halves_of(numbers):
    """The lower and the upper 32 bits of int64 numbers, as int64."""
    upper = tf.bitwise.right_shift(numbers, tf.constant(32, tf.int64))
    return tf.bitwise.bitwise_and(numbers, 0xFFFFFFFF), tf.bitwise.bitwise_and(upper, 0xFFFFFFFF)


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


class Standardise(layers.Layer):
    """Each image minus its own mean, divided by its own deviation, per channel [ours]: a contrast that does not depend
    on skin, light and camera. Input and output float32 (N, H, W, C). An image of one colour becomes 0."""

    def call(self, inputs):
        centred = inputs - tf.reduce_mean(inputs, [1, 2], keepdims=True)
        deviation = tf.sqrt(tf.reduce_mean(tf.square(centred), [1, 2], keepdims=True))
        return centred / (deviation + LEAST_CONTRAST)


def build_unet(
    height,
    width,
    channels=1,
    filters=32,
    dropout=0.5,
    precision="float32",
    initializer="GlorotUniform",
    standardise=False,
):
    """The network of the paper's published code.

    Input float32 (N, height, width, channels), normalised; output float32 (N, height, width, 1), the probability
    of lesion. Two 3x3 ReLU convolutions per level with `filters` to 16 * `filters` channels, 2x2 max-pooling,
    nearest up-sampling then concatenation, and one dropout layer after the bottleneck. 7,846,081 parameters for one
    channel and 32 filters. precision: a key of PRECISIONS, the type in which the layers compute. initializer: the
    name of a Keras initializer. standardise: put `Standardise` before the first layer.
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
    if standardise:
        x = Standardise(dtype="float32", name="standardise")(x)
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
    model = keras.Model(inputs, outputs, name="unet")
    model.jit_compile = False  # XLA would compile predictions anew for each number of images
    return model


def halves(model, on_gpu=False):
    """Split the network of `build_unet` at its dropout, rearranged to avoid repeated work. Returns two functions:
    `encode`, images -> (bottleneck, rest), and `decode`, (bottleneck, rest) -> probabilities.

    1. The first convolution of a decoder level is linear in its two inputs. The half for the skip connection does not
       depend on the bottleneck, so `encode` computes it.
    2. Nearest up-sampling by 2 and then a 3x3 convolution equal one 4x4 transposed convolution with a stride of 2. The
       large map is never made, and only 4 of 9 multiplications remain. on_gpu: the same as one 2x2 convolution to four
       maps, for even and odd rows and columns, which is faster on a GPU, and the last layer as a sum.
    """
    skips = [model.get_layer(f"encoder_{level}_b").output for level in range(LEVELS)]
    encoder = keras.Model(model.input, [model.get_layer("dropout").input, *skips])
    first, second = ([model.get_layer(f"decoder_{n}_{letter}") for n in range(LEVELS)] for letter in "ab")
    last = model.get_layer("probability")
    kernel_of, enlarge = (_four_kernels, _enlarge_in_four) if on_gpu else (_transposed_kernel, _enlarge)

    def encode(images):
        bottleneck, *skips = encoder(images)
        dtype, rest = bottleneck.dtype, []
        for layer, skip in zip(first, skips):
            up, beside = tf.split(layer.kernel, [-1, skip.shape[-1]], axis=2)
            half = tf.nn.conv2d(skip, tf.cast(beside, dtype), 1, "SAME")
            rest.append((tf.cast(kernel_of(up), dtype), tf.nn.bias_add(half, tf.cast(layer.bias, dtype))))
        return bottleneck, rest

    def decode(x, rest):
        for (kernel, half), layer in reversed(list(zip(rest, second))):
            x = layer(tf.nn.relu(enlarge(x, kernel, half) + half))
        if on_gpu:
            products = tf.cast(x, tf.float32) * last.kernel[0, 0, :, 0]
            return tf.sigmoid(tf.reduce_sum(products, -1, keepdims=True) + last.bias)
        return last(x)

    return encode, decode


def _transposed_kernel(kernel):
    """Convert a kernel (3, 3, in, out) for use after nearest up-sampling by 2 to a transposed one (4, 4, out, in)."""
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    summed = tf.add_n([tf.pad(kernel, [[r, 1 - r], [c, 1 - c], [0, 0], [0, 0]]) for r, c in corners])
    return tf.transpose(summed[::-1, ::-1], [0, 1, 3, 2])


def _enlarge(x, kernel, half):
    """Up-sampling and convolution by a `_transposed_kernel`, to the size of `half`."""
    return tf.nn.conv2d_transpose(x, kernel, tf.shape(half), 2, "SAME")


def _four_kernels(kernel):
    """Convert a kernel (3, 3, in, out) for use after nearest up-sampling by 2 to one (2, 2, in, 4 * out) of four: for
    even rows and columns, even rows and odd columns, odd rows and even columns, odd rows and columns."""

    def of_parities(k, axis):
        a, b, c = tf.unstack(k, axis=axis)
        return tf.stack([a, b + c], axis), tf.stack([a + b, c], axis)

    return tf.concat([four for rows in of_parities(kernel, 0) for four in of_parities(rows, 1)], -1)


def _enlarge_in_four(x, kernel, half):
    """Up-sampling and convolution by `_four_kernels`, whose maps are then put together to the size of `half`."""
    height, width, filters = *x.shape[1:3], half.shape[-1]
    maps = tf.nn.conv2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), kernel, 1, "VALID")
    even_odd = [
        tf.stack([maps[:, r : r + height, c : c + width, n * filters : (n + 1) * filters] for c, n in columns], 3)
        for r, columns in ((0, ((0, 0), (1, 1))), (1, ((0, 2), (1, 3))))
    ]
    return tf.reshape(tf.stack(even_odd, 2), [-1, 2 * height, 2 * width, filters])


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
    standardise = any(isinstance(layer, Standardise) for layer in model.layers)
    return {
        **sizes,
        "dropout": dropout.rate,
        "precision": precision,
        "initializer": initializer,
        "standardise": standardise,
    }


def build_from(settings, precision):
    """The network of a weights file's settings, a dict as `load_unet` returns it, with weights that do not matter."""
    names = "height", "width", "channels", "filters", "dropout"
    return build_unet(
        **{name: settings[name] for name in names},
        precision=precision,
        standardise=settings.get("standardise", False),
    )


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
def dice_loss(y_true, y_pred, real=None):
    """The published loss: minus the soft Dice coefficient of the batch. With several devices each returns an equal
    part, because Keras adds up scalar losses. real: float32 (N, 1, 1, 1), 1 for an image and 0 for padding."""
    if real is not None:
        y_true, y_pred = y_true * real, y_pred * real
    return -dice_coefficient(y_true, y_pred) / tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable("ceal")
def dice_bce_loss(y_true, y_pred, real=None):
    """The published loss plus the mean binary cross-entropy of the batch, whose gradient does not vanish where the
    network is sure and wrong. With the published loss alone it may predict only skin and stay in that state."""
    return dice_loss(y_true, y_pred, real) + _mean_entropy(y_true, y_pred, real)


def _mean_entropy(y_true, y_pred, real):
    """The mean binary cross-entropy of the batch; with several devices each returns its part of the sum."""
    entropies = keras.losses.binary_crossentropy(y_true, y_pred)
    if real is not None:
        entropies *= real[..., 0]
        return tf.reduce_sum(entropies) / tf.reduce_sum(real * tf.ones_like(y_pred))
    (count,) = _of_all_devices([tf.cast(tf.size(entropies), tf.float32)])
    return tf.reduce_sum(entropies) / count


def mean_tversky(y_true, y_pred, real, false_positives, false_negatives, smooth=1.0):
    """Mean over the images of the soft Tversky index (Salehi et al., arXiv 1706.05721): the overlap, divided by itself
    plus the false positives and the false negatives, each with its weight. With the weights 1 and 1 it is the Jaccard
    index, with 0.5 and 0.5 the Dice coefficient. With several devices each returns its part of the sum."""
    overlap, truth, predicted = (tf.reduce_sum(maps, [1, 2, 3]) for maps in (y_true * y_pred, y_true, y_pred))
    wrong = false_positives * (predicted - overlap) + false_negatives * (truth - overlap)
    indices = (overlap + smooth) / (overlap + wrong + smooth)
    if real is not None:
        return tf.reduce_sum(indices * tf.reshape(real, [-1])) / tf.reduce_sum(real)
    (count,) = _of_all_devices([tf.cast(tf.size(indices), tf.float32)])
    return tf.reduce_sum(indices) / count


@keras.saving.register_keras_serializable("ceal")
def jaccard_bce_loss(y_true, y_pred, real=None):
    """Cross-entropy minus the mean soft Jaccard index of the images [ours]. Each image counts the same, as in the
    challenge's metric; in `dice_loss` large lesions count more."""
    return _mean_entropy(y_true, y_pred, real) - mean_tversky(y_true, y_pred, real, 1.0, 1.0)


@keras.saving.register_keras_serializable("ceal")
def tversky_bce_loss(y_true, y_pred, real=None):
    """Cross-entropy minus the mean Tversky index of the images, with Salehi's weights 0.3 and 0.7 [ours]: a missed
    pixel of lesion costs more than a pixel of skin that is marked."""
    return _mean_entropy(y_true, y_pred, real) - mean_tversky(y_true, y_pred, real, 0.3, 0.7)


LOSSES = {
    "dice": dice_loss,
    "dice_bce": dice_bce_loss,
    "jaccard_bce": jaccard_bce_loss,
    "tversky_bce": tversky_bce_loss,
}


# -------------------------------------------------------------------------------------------------------- weights files


def save_unet(model, path, mean, std, dtype="float32"):
    """Write the weights to `path` (*.weights.h5, standard Keras) and the settings to its attribute `unet`: height,
    width, channels, filters, dropout, whether it standardises each image, and the normalisation's mean and std, each a
    list with a float per channel.

    dtype: `float16` stores the large kernels in half precision, as in weights/; the loaded network is float32 again."""
    settings = {**unet_settings(model), "mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    del settings["precision"], settings["initializer"]  # they belong to the training
    if not settings["standardise"]:
        del settings["standardise"]  # as in files of earlier versions
    if dtype == "float16":
        half = keras.models.clone_model(model, clone_function=_stored_in_half)
        half.set_weights(model.get_weights())
        model = half
    save_weights(model, path, unet=json.dumps(settings))


def _stored_in_half(layer):
    """The same layer, in float16 if it has many weights. The finest levels have few; they decide where contours lie."""
    many = layer.count_params() > 30_000
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
    if type(settings.get("standardise", False)) is not bool:
        raise ValueError(f"impossible standardise: {settings['standardise']}")
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
        model = build_from(settings, precision)
        load_weights(model, path)
        if not all(np.isfinite(values).all() for values in model.get_weights()):
            raise ValueError("some weights are not finite, because their training diverged")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError, UserWarning) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: not a weights file of train.py ({reason}); give the model.weights.h5 of a run")
    return model, settings
