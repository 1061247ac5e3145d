"""The paper's U-Net with dropout in Keras, its Dice loss, and Monte Carlo dropout."""

import contextlib
import functools
import json
import math
import os
import time
import warnings
from hashlib import blake2b

import h5py
import numpy as np

from utils import LARGEST_SIDE, UserError, derived_seed, in_one_line, reserve, whole_file


@contextlib.contextmanager
def silent_stderr():
    """Send what is written to the process's stderr, by C libraries too, nowhere. Exceptions pass."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set it to 0 to see, say, why no GPU is found
with silent_stderr():  # TensorFlow's first notices obey no log level
    import keras
    import tensorflow as tf
    from keras import layers


def print_devices():
    """Print TensorFlow's version and the devices that it found."""
    names = [device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices()]
    print(f"TensorFlow {tf.__version__} found {', '.join(names)}", flush=True)


LEVELS = 4  # times that the network halves its input
# How the convolutions' weights are drawn at first: as published, which is Keras' default, or as is usual before ReLU.
INITIALIZERS = "GlorotUniform", "HeNormal"
# What --precision means: in the half-width types the layers compute; weights, loss and output stay float32.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Dropout(layers.Dropout):
    """Dropout that draws one mask for the whole batch and gives each replica its rows of it, so that training on
    several devices drops what training on one would drop."""

    def call(self, inputs, training=False):
        context = tf.distribute.get_replica_context()
        if not training or context.num_replicas_in_sync == 1:
            return super().call(inputs, training=training)
        sizes = context.all_gather(tf.shape(inputs)[:1], axis=0)
        first = tf.cumsum(sizes, exclusive=True)[context.replica_id_in_sync_group]
        ones = tf.ones([tf.reduce_sum(sizes), *inputs.shape[1:]], inputs.dtype)
        masks = keras.random.dropout(ones, self.rate, seed=self.seed_generator)
        return inputs * masks[first : first + tf.shape(inputs)[0]]


def build_unet(height, width, channels=1, filters=32, dropout=0.5, precision="float32", initializer="GlorotUniform"):
    """The network of the paper's published code.

    Input float32 (N, height, width, channels), normalised; output float32 (N, height, width, 1), the probability
    of lesion. Two 3x3 ReLU convolutions per level with `filters` to 16 * `filters` channels, 2x2 max-pooling,
    nearest up-sampling then concatenation, and one dropout layer after the bottleneck. 7,846,081 parameters for one
    channel and 32 filters. precision: a key of PRECISIONS, what the layers compute in. initializer: of INITIALIZERS.
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
    # float32 whatever the precision: the loss and the variance need it.
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="probability")(x)
    return keras.Model(inputs, outputs, name="unet")


def _halves(model):
    """The network of `build_unet` before and after its dropout, rearranged so that little is computed twice: `encode`,
    images -> bottleneck, rest; and `decode`, bottleneck, rest -> probabilities.

    1. A decoder level's first convolution is linear in its two inputs; the half that sees the skip connection does not
       depend on the bottleneck: it belongs to the rest.
    2. Nearest up-sampling by 2, then a 3x3 convolution, is one 4x4 convolution transposed with a stride of 2: the
       large map is never made, and 4 multiplications remain of 9.
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
    """(3, 3, in, out), for a convolution after nearest up-sampling by 2, to (4, 4, out, in), for a transposed one."""
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    summed = tf.add_n([tf.pad(kernel, [[r, 1 - r], [c, 1 - c], [0, 0], [0, 0]]) for r, c in corners])
    return tf.transpose(summed[::-1, ::-1], [0, 1, 3, 2])


def count_parameters(channels, filters):
    """The number of weights of such a `build_unet`, found without making it."""
    widths = [filters * 2**level for level in range(LEVELS + 1)]
    encoder = zip([channels, *widths], widths)
    decoder = ((3 * width, width) for width in widths[:-1])  # the skip connection, and twice as many from below
    convolutions = sum(9 * (inputs + width) * width + 2 * width for inputs, width in [*encoder, *decoder])
    return convolutions + filters + 1


def unet_settings(model):
    """What `build_unet` needs to build this network again, a dict. Raises ValueError if it is of another kind."""
    _, height, width, channels = model.input_shape
    dropout = model.get_layer("dropout")
    (precision,) = [name for name, policy in PRECISIONS.items() if policy == dropout.dtype_policy.name]
    first = model.get_layer("encoder_0_a")
    sizes = {"height": height, "width": width, "channels": channels, "filters": first.filters}
    initializer = type(first.kernel_initializer).__name__
    return {**sizes, "dropout": dropout.rate, "precision": precision, "initializer": initializer}


def share_out(strategy, *batch):
    """Each array of the batch as equal shares (but for one image) for the strategy's devices."""
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


def dice_coefficient(y_true, y_pred, smooth=1.0):
    """Soft Dice coefficient, pooled over all pixels of the batch, as published; a float32 scalar in (0, 1].

    The batch is the whole one, on however many devices it lies.
    """
    y_true = tf.reshape(tf.cast(y_true, tf.float32), [-1])
    y_pred = tf.reshape(tf.cast(y_pred, tf.float32), [-1])
    overlap, sizes = tf.reduce_sum(y_true * y_pred), tf.reduce_sum(y_true) + tf.reduce_sum(y_pred)
    overlap, sizes = _of_all_devices([overlap, sizes])
    return (2.0 * overlap + smooth) / (sizes + smooth)


def _of_all_devices(sums):
    """These sums over the device's share of the batch, a list, added up over all devices."""
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce("SUM", sums) if replica and replica.num_replicas_in_sync > 1 else sums


@keras.saving.register_keras_serializable("ceal")  # so that a compiled model can be cloned
def dice_loss(y_true, y_pred):
    """The published loss: minus the soft Dice coefficient of the batch. Of several devices each returns an equal part,
    for Keras adds up a loss that is one number."""
    return -dice_coefficient(y_true, y_pred) / tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable("ceal")
def dice_bce_loss(y_true, y_pred):
    """The published loss plus the batch's mean binary cross-entropy, whose gradient does not vanish where the network
    is sure and wrong: with the Dice coefficient alone it may call every pixel skin and never leave that state."""
    entropies = keras.losses.binary_crossentropy(y_true, y_pred)
    (count,) = _of_all_devices([tf.cast(tf.size(entropies), tf.float32)])
    return dice_loss(y_true, y_pred) + tf.reduce_sum(entropies) / count


LOSSES = {"dice": dice_loss, "dice_bce": dice_bce_loss}


# --------------------------------------------------------------------------------------------------------- training


class ColourJitter(layers.Layer):
    """Changes contrast, by up to a fifth, and brightness, in each channel by up to 0.3, of a batch (N, H, W, C) of
    normalised images, each in its own way; not its last channel, the mask."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.generator = seed, keras.random.SeedGenerator(seed)

    def call(self, inputs):
        images, masks = inputs[..., :-1], inputs[..., -1:]
        count, channels = tf.shape(images)[0], images.shape[-1]
        contrast = keras.random.uniform((count, 1, 1, 1), 0.8, 1.2, seed=self.generator)
        brightness = keras.random.uniform((count, 1, 1, channels), -0.3, 0.3, seed=self.generator)
        mean = tf.reduce_mean(images, [1, 2], keepdims=True)
        return tf.concat([(images - mean) * contrast + mean + brightness, masks], -1)


def augmentation(rotation, width_shift, seed, strong=False):
    """Keras layers that rotate a batch (N, H, W, C) float32, its last channel the mask, by up to `rotation` degrees
    either way, shift it by up to `width_shift` of its width and mirror it, each image in its own way. strong: also
    shift it as far in height, zoom by up to 15 %, mirror it vertically, and change the images' colours."""
    height_shift = width_shift if strong else 0.0
    movements = [
        layers.RandomRotation(rotation / 360, fill_mode="nearest", seed=derived_seed(seed, "rotation")),
        layers.RandomTranslation(height_shift, width_shift, fill_mode="nearest", seed=derived_seed(seed, "shift")),
        layers.RandomFlip("horizontal_and_vertical" if strong else "horizontal", seed=derived_seed(seed, "flip")),
    ]
    if strong:
        zoom = layers.RandomZoom((-0.15, 0.15), fill_mode="nearest", seed=derived_seed(seed, "zoom"))
        movements += [zoom, ColourJitter(derived_seed(seed, "colours"))]
    return keras.Sequential(movements)


def training_batches(read, first, last, augment=None):
    """A tf.data.Dataset of the batches `first` to `last` - 1, each made while the step before is computed.

    read: the number of a batch -> images, float32 (b, H, W, C), normalised, and targets, float32 (b, H, W, 1) in
    [0, 1]. With `augment` (a keras.Sequential) image and mask are moved together, the mask being one more channel of
    the image while they move. How depends on the batch's number alone, not on where the training began.
    """
    shapes = [(None, *array.shape[1:]) for array in read(first)]

    def batch(number):
        pictures, masks = map(tf.ensure_shape, tf.numpy_function(read, [number], (tf.float32, tf.float32)), shapes)
        if augment:
            for layer in augment.layers:
                restart(layer.generator, layer.seed, 100 * number)  # a layer may draw several times
            moved = augment(tf.concat([pictures, masks], -1), training=True)
            # A mask stays two-valued; a pseudo-label, which is soft, stays soft.
            two_valued = tf.reduce_all(masks == tf.round(masks), [1, 2, 3], keepdims=True)
            pictures, masks = moved[..., :-1], tf.where(two_valued, tf.round(moved[..., -1:]), moved[..., -1:])
        return pictures, masks

    # The layers' random state makes the map sequential; its operations use all cores.
    return tf.data.Dataset.range(first, last).map(batch).prefetch(2)


def restart(generator, seed, number):
    """Let a keras.random.SeedGenerator go on from these two."""
    generator.state.assign(tf.cast(tf.stack([tf.cast(seed, tf.int64), number]), generator.state.dtype))


SCHEDULES = "constant", "cosine"
WARM_UP = 0.05  # of a training: the Dice loss collapses under large first steps


def learning_rate(schedule, done):
    """The learning rate as a share of the highest, when this share of the training's steps is done: 1 throughout as
    published, or up in the first twentieth and down along a cosine to 0, so that the training ends settled."""
    if schedule == "constant":
        return 1.0
    return min(1.0, (done + 0.001) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))


def training_step(model):
    """A compiled function (images, targets) that trains the network of `build_unet` on this batch, of which each device
    has a share. It is Keras' own step, by the network's `_halves`: the same gradients to rounding."""
    dropout, (encode, decode) = model.get_layer("dropout"), _halves(model)

    def train(images, targets):
        with tf.GradientTape() as tape:
            bottleneck, rest = encode(images)
            loss = model.compute_loss(images, targets, decode(dropout(bottleneck, training=True), rest))
            loss = model.optimizer.scale_loss(loss)
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    @tf.function(reduce_retracing=True, jit_compile=model.jit_compile)
    def step(images, targets):
        model.distribute_strategy.run(train, (images, targets))

    return step


class Checkpoint:
    """A training under way, in a file of the run's folder: the network, the optimizer and the steps done."""

    EVERY = 60  # seconds: what a crash costs at most

    def __init__(self, model, run):
        self.model, self.path, self.saved = model, run / ".training.weights.h5", time.monotonic()

    def save_now_and_then(self, iteration, steps):
        """Save if the last time is long ago."""
        if time.monotonic() - self.saved > self.EVERY:
            save_weights(self.model, self.path, iteration=iteration, steps=steps)
            self.saved = time.monotonic()

    def load(self, iteration):
        """Put the model where this iteration's training was; returns the steps done, 0 if there is no such file.
        Raises UserError if the file is damaged."""
        self.saved = time.monotonic()
        if not self.path.exists():
            return 0
        try:
            with h5py.File(self.path) as file:
                found, steps = int(file.attrs["iteration"]), int(file.attrs["steps"])
            if found != iteration:
                return 0
            load_weights(self.model, self.path)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, UserWarning) as error:
            reason = in_one_line(error)
            raise UserError(f"{self.path}: damaged ({reason}); remove it to do this iteration's training again")
        return steps


# ---------------------------------------------------------------------------------------------- Monte Carlo dropout


MEASURES = "variance", "entropy", "bald"


def mc_dropout(model, images, passes, seed, keys=None, batch_size=16, mean=0.0, std=1.0, measure="variance"):
    """Mean and uncertainty map of `passes` stochastic predictions (the paper's section 2, its Fig. 1).

    images: uint8 or float32 (N, H, W, C); the network sees (images - mean) / std, mean and std being a float per
    channel or one for all. Returns (mean, uncertainty), float32 (N, H, W) each. measure: what a pixel's uncertainty
    is, the `variance` of its predictions, the population's, as in the paper; the `entropy` of their mean, in nats; or
    `bald`, the mutual information of prediction and dropout: that entropy less the predictions' mean entropy. A pass
    of an image draws its dropout mask from (seed, the image's key, the number of the pass) alone, so neither the
    batch size, nor the order, nor the other images, nor the number of devices matter. keys: an int per image that
    names it, say its position in the data set; without them its pixels do. Each device gets `batch_size` images at
    a time.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    images = np.ascontiguousarray(images, None if images.dtype == np.uint8 else np.float32)
    image_seeds = _image_seeds(images if keys is None else np.asarray(keys, np.int64), seed)
    constants = np.int64(passes), np.atleast_1d(np.float32(mean)), np.atleast_1d(np.float32(std))
    maps = np.empty((2, *images.shape[:3]), np.float32)
    step = batch_size * model.distribute_strategy.num_replicas_in_sync
    for start in range(0, len(images), step):
        some = slice(start, start + step)
        maps[:, some] = _on_all_devices(model, images[some], image_seeds[some], constants, measure)
    return tuple(maps)


def _on_all_devices(model, images, image_seeds, constants, measure):
    """(mean, uncertainty) of one step's images, shared out among the devices of the model's strategy."""
    strategy, sample = model.distribute_strategy, _sampler(model, images.dtype, measure)
    maps = sample(*share_out(strategy, images, image_seeds), *map(tf.constant, constants))
    return [np.concatenate(strategy.experimental_local_results(kind)) for kind in maps]


def _image_seeds(names, seed):
    """An int64 for each name, an image's pixels or key, and the seed."""
    salt = int(seed).to_bytes(8, "little", signed=True)
    return np.frombuffer(b"".join(blake2b(name.tobytes(), digest_size=8, salt=salt).digest() for name in names), "<i8")


@functools.lru_cache(maxsize=4)
def _sampler(model, dtype, measure):
    """A compiled function (images, image_seeds, passes, mean, std) -> (mean, uncertainty) for images of this dtype."""
    prepare = _decoder_passes(model) if _is_build_unet(model) else _whole_network_passes(model)

    def sample(images, image_seeds, passes, mean, std):
        normalised = tf.ensure_shape((tf.cast(images, tf.float32) - mean) / std, images.shape)
        one_pass = prepare(normalised, image_seeds)
        mean = total = tf.zeros(tf.shape(images)[:3])
        for number in tf.range(passes):
            prediction = one_pass(number)
            # Welford's update: the passes need not be kept, and a small variance does not cancel away.
            difference = prediction - mean
            mean += difference / tf.cast(number + 1, tf.float32)
            if measure != "entropy":  # which rests on the mean alone
                total += difference * (prediction - mean) if measure == "variance" else _entropy(prediction)
        of_passes = total / tf.cast(passes, tf.float32)
        return mean, {
            "variance": of_passes,
            "entropy": _entropy(mean),
            "bald": tf.maximum(_entropy(mean) - of_passes, 0.0),  # below 0 by rounding alone
        }[measure]

    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync > 1:
        return tf.function(lambda *batch: strategy.run(sample, batch), reduce_retracing=True)
    image, channels = tf.TensorSpec((None, *model.input_shape[1:]), dtype), tf.TensorSpec([None], tf.float32)
    image_seeds, passes = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)
    return tf.function(sample, input_signature=[image, image_seeds, passes, channels, channels])


def _entropy(probability):
    """Of a yes or no with this probability, in nats."""
    return -tf.math.xlogy(probability, probability) - tf.math.xlog1py(1.0 - probability, -probability)


def _is_build_unet(model):
    """Whether the network is exactly one of `build_unet`, so that its passes may be rearranged."""
    try:
        return model.get_config() == build_unet(**unet_settings(model)).get_config()
    except (ValueError, AttributeError):  # other layers, another size
        return False


def _dropout_masks(shape, rate, image_seeds, number):
    """bool (N, *shape): what pass `number` keeps of each image."""
    seeds = tf.stack([image_seeds, tf.fill(tf.shape(image_seeds), number)], 1)

    def kept(seed):
        # An algorithm by name: the default differs between devices.
        return tf.random.stateless_uniform(shape, seed, alg="philox") >= rate

    return tf.map_fn(kept, seeds, fn_output_signature=tf.bool)


class _KnownDropout(layers.Dropout):
    """Dropout in a pass of `_whole_network_passes`, which sets what the masks depend on."""

    image_seeds = number = None

    def call(self, inputs, training=False):
        masks = _dropout_masks(inputs.shape[1:], self.rate, self.image_seeds, self.number)
        return inputs / tf.cast(1.0 - self.rate, inputs.dtype) * tf.cast(masks, inputs.dtype)


def _whole_network_passes(model):
    """The plain way, for any network with dropout: each pass runs all of it. See `_sampler`."""

    def swap(layer):
        return _KnownDropout(layer.rate, dtype=layer.dtype_policy) if isinstance(layer, layers.Dropout) else layer

    twin = keras.models.clone_model(model, clone_function=swap)
    dropouts = [layer for layer in twin.layers if isinstance(layer, _KnownDropout)]

    def prepare(images, image_seeds):
        def one_pass(number):
            for index, layer in enumerate(dropouts):
                layer.image_seeds, layer.number = image_seeds + index, number
            return twin(images, training=False)[..., 0]

        return one_pass

    return prepare


def _decoder_passes(model):
    """The fast way, for `build_unet`: the same passes, by its `_halves`; the encoder runs once per image, for all that
    is random comes after it. See `_sampler`."""
    dropout, (encode, decode) = model.get_layer("dropout"), _halves(model)

    def prepare(images, image_seeds):
        bottleneck, rest = encode(images)
        bottleneck /= tf.cast(1.0 - dropout.rate, bottleneck.dtype)

        def one_pass(number):
            masks = _dropout_masks(bottleneck.shape[1:], dropout.rate, image_seeds, number)
            return decode(bottleneck * tf.cast(masks, bottleneck.dtype), rest)[..., 0]

        return one_pass

    return prepare


# ---------------------------------------------------------------------------------------------------- weights files


def save_unet(model, path, mean, std):
    """Write the weights to `path` (*.weights.h5, standard Keras) and, as its attribute `unet`, what else they need:
    height, width, channels, filters, dropout, and the normalisation's mean and std, a list of float per channel."""
    settings = {**unet_settings(model), "mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    del settings["precision"], settings["initializer"]  # of the training: the weights are float32 in any case
    save_weights(model, path, unet=json.dumps(settings))


def save_weights(model, path, **attributes):
    """Write the weights, and the optimizer's state if there is one, to `path` (*.weights.h5), whole or not at all."""
    optimizer = getattr(model, "optimizer", None)  # a network that was not compiled has none
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    with whole_file(path) as partial:
        reserve(partial, sum(4 * math.prod(variable.shape) + 4096 for variable in variables))
        model.save_weights(partial)
        with h5py.File(partial, "a") as file:
            file.attrs.update(attributes)


def load_weights(model, path):
    """`model.load_weights`, which raises UserWarning for what is not in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # else Keras goes on without
        model.load_weights(path)


def _checked_settings(path):
    """The settings of a weights file, a dict of what `save_unet` wrote. Raises ValueError and the like if they cannot
    be: nothing is built, and no memory taken, by what a file merely claims."""
    if not os.path.isfile(path) or not str(path).endswith(".weights.h5"):
        raise ValueError("Keras wants a file whose name ends in .weights.h5")
    with h5py.File(path) as file:
        settings = json.loads(file.attrs["unet"])
    sizes = [settings[name] for name in ("height", "width", "channels", "filters")]
    height, width, channels, filters = sizes
    whole = all(type(size) is int and size > 0 for size in sizes)
    if not whole or max(height, width) > LARGEST_SIDE or channels not in (1, 3):
        raise ValueError(f"impossible height, width, channels or filters: {sizes}")
    if 4 * count_parameters(channels, filters) > os.path.getsize(path):
        raise ValueError(f"the file is too small for {filters} filters")
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"impossible dropout: {settings['dropout']}")
    normalisation = np.array([settings["mean"], settings["std"]], float)
    if normalisation.shape != (2, channels) or not np.isfinite(normalisation).all() or normalisation[1].min() <= 0:
        raise ValueError("impossible mean or std")
    return settings


def load_unet(path, precision="float32"):
    """Read what `save_unet` wrote. Returns (model, settings), `settings` being the dict in the file's attribute.

    precision: a key of PRECISIONS, what the network is to compute in. Raises UserError if the file is missing, is not
    a weights file of this project, or is damaged. Numbers are all that is read: nothing in a file is ever run.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such weights file; train.py writes iteration_KK/model.weights.h5")
    try:
        settings = _checked_settings(path)
        sizes = {k: settings[k] for k in ("height", "width", "channels", "filters", "dropout")}
        model = build_unet(**sizes, precision=precision)
        load_weights(model, path)
        if not all(np.isfinite(values).all() for values in model.get_weights()):
            raise ValueError("some are not finite: the training that wrote them broke down")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError, UserWarning) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: these are no weights written by train.py ({reason}); give those of a run")
    return model, settings
