"""The paper's U-Net with dropout in Keras, its Dice loss, and Monte Carlo dropout."""

import contextlib
import functools
import json
import os
import warnings
from hashlib import blake2b

import h5py
import numpy as np

from utils import UserError, whole_file


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


def build_unet(height, width, channels=1, filters=32, dropout=0.5):
    """The network of the paper's published code.

    Input float32 (N, height, width, channels), normalised; output float32 (N, height, width, 1), the probability
    of lesion. Two 3x3 ReLU convolutions per level with `filters` to 16 * `filters` channels, 2x2 max-pooling,
    nearest up-sampling then concatenation, and one dropout layer after the bottleneck. 7,846,081 parameters for one
    channel and 32 filters. Raises ValueError if height or width cannot be halved four times.
    """
    if height % 2**LEVELS or width % 2**LEVELS or min(height, width) < 2**LEVELS:
        raise ValueError(f"height and width must be multiples of {2**LEVELS}, not {height} and {width}")

    def convolutions(x, level, name):
        for letter in "ab":
            x = layers.Conv2D(filters * 2**level, 3, padding="same", activation="relu", name=f"{name}_{letter}")(x)
        return x

    x = inputs = keras.Input((height, width, channels), name="image")
    skips = []
    for level in range(LEVELS):
        x = convolutions(x, level, f"encoder_{level}")
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = convolutions(x, LEVELS, "bottleneck")
    x = layers.Dropout(dropout, name="dropout")(x)
    for level in reversed(range(LEVELS)):
        x = layers.Concatenate()([layers.UpSampling2D(2)(x), skips[level]])
        x = convolutions(x, level, f"decoder_{level}")
    # float32 whatever the precision policy: the loss and the variance need it.
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="probability")(x)
    return keras.Model(inputs, outputs, name="unet")


def dice_coefficient(y_true, y_pred, smooth=1.0):
    """Soft Dice coefficient, pooled over all pixels of the batch, as published; a float32 scalar in (0, 1]."""
    y_true = tf.reshape(tf.cast(y_true, tf.float32), [-1])
    y_pred = tf.reshape(tf.cast(y_pred, tf.float32), [-1])
    overlap = tf.reduce_sum(y_true * y_pred)
    return (2.0 * overlap + smooth) / (tf.reduce_sum(y_true) + tf.reduce_sum(y_pred) + smooth)


def dice_loss(y_true, y_pred):
    """The published loss: minus the soft Dice coefficient of the batch."""
    return -dice_coefficient(y_true, y_pred)


def mc_dropout(model, images, passes, seed, keys=None, batch_size=16):
    """Mean and variance of `passes` stochastic predictions (the paper's section 2, its Fig. 1).

    images: float32 (N, H, W, C), normalised as for training. Returns (mean, variance), float32 (N, H, W) each; the
    variance is the population's. A pass of an image draws its dropout mask from (seed, the image's key, the number
    of the pass) alone, so neither the batch size, nor the order, nor the other images matter. keys: an int per image
    that names it, say its position in the data set; without them its pixels do.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    images = np.ascontiguousarray(images, np.float32)
    mean, variance = np.empty((2, *images.shape[:3]), np.float32)
    sample = _sampler(model)
    names = images if keys is None else np.asarray(keys, np.int64)
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        mean[batch], variance[batch] = sample(images[batch], _image_seeds(names[batch], seed), passes)
    return mean, variance


def _image_seeds(names, seed):
    """An int64 for each name, an image's pixels or key, and the seed."""
    salt = int(seed).to_bytes(8, "little", signed=True)
    return np.frombuffer(b"".join(blake2b(name.tobytes(), digest_size=8, salt=salt).digest() for name in names), "<i8")


@functools.lru_cache(maxsize=1)
def _sampler(model):
    """A compiled function (images, image_seeds, passes) -> (mean, variance); the encoder runs once for all passes."""
    dropout = model.get_layer("dropout")
    skips = [model.get_layer(f"encoder_{level}_b").output for level in range(LEVELS)]
    encoder = keras.Model(model.input, [dropout.input, *skips])
    decoder = keras.Model([dropout.output, *skips], model.output)
    shape = dropout.output.shape[1:]

    def dropout_mask(seed):
        # An algorithm by name: the default differs between devices.
        return tf.random.stateless_uniform(shape, seed, alg="philox") >= dropout.rate

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, *model.input_shape[1:]), tf.float32),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([], tf.int64),
        ]
    )
    def sample(images, image_seeds, passes):
        bottleneck, *skips = encoder(images, training=False)
        bottleneck /= tf.cast(1.0 - dropout.rate, bottleneck.dtype)
        mean = squares = tf.zeros(tf.shape(images)[:3])
        for number in tf.range(passes):
            seeds = tf.stack([image_seeds, tf.fill(tf.shape(image_seeds), number)], 1)
            masks = tf.map_fn(dropout_mask, seeds, fn_output_signature=tf.bool)
            prediction = decoder([bottleneck * tf.cast(masks, bottleneck.dtype), *skips], training=False)[..., 0]
            # Welford's update: the passes need not be kept, and a small variance does not cancel away.
            difference = prediction - mean
            mean += difference / tf.cast(number + 1, tf.float32)
            squares += difference * (prediction - mean)
        return mean, squares / tf.cast(passes, tf.float32)

    return sample


def save_unet(model, path, mean, std):
    """Write the weights to `path` (*.weights.h5, standard Keras) and, as its attribute `unet`, what else they need:
    height, width, channels, filters, dropout, and the normalisation's mean and std, a list of float per channel."""
    _, height, width, channels = model.input_shape
    settings = {
        "height": height,
        "width": width,
        "channels": channels,
        "filters": model.get_layer("encoder_0_a").filters,
        "dropout": model.get_layer("dropout").rate,
        "mean": [float(m) for m in mean],
        "std": [float(s) for s in std],
    }
    with whole_file(path) as partial:
        model.save_weights(partial)
        with h5py.File(partial, "a") as file:
            file.attrs["unet"] = json.dumps(settings)


def load_unet(path):
    """Read what `save_unet` wrote. Returns (model, settings), `settings` being the dict in the file's attribute.

    Raises UserError if the file is missing, is not a weights file of this project, or is damaged.
    """
    try:
        with h5py.File(path) as file:
            settings = json.loads(file.attrs["unet"])
        model = build_unet(**{k: settings[k] for k in ("height", "width", "channels", "filters", "dropout")})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras only warns of layers that it does not find in the file
            model.load_weights(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such weights file; train.py writes iteration_KK/model.weights.h5")
    except (OSError, KeyError, ValueError, UserWarning) as error:
        raise UserError(f"{path}: these are no weights written by train.py ({str(error).splitlines()[0]})")
    return model, settings
