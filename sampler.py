"""Monte Carlo dropout: T stochastic predictions of each image, their mean and their uncertainty map [P, section 2].

The fast sampler computes once per image what does not depend on dropout. The plain one works for any network with
dropout. Nothing here trains a network or computes scores.
"""

import functools
import threading
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from devices import compiled, keras, on_gpu, share_out, tf
from unet import build_unet, halves, kept_units, kept_units_of_images, layers, unet_settings
from utils import map_in_order


class Measure(NamedTuple):
    """A measure of uncertainty: a value for each pass, averaged over the passes, and a function of the average."""

    of_pass: object  # (prediction, mean before this pass, mean after it) -> float32 (N, H, W); None: not needed
    of_all: object  # (mean of the predictions, average of `of_pass`) -> the uncertainty map, float32 (N, H, W)


def entropy(probability):
    """Entropy of a binary outcome with this probability, in nats."""
    return -tf.math.xlogy(probability, probability) - tf.math.xlog1py(1.0 - probability, -probability)


def mutual_information(mean, mean_entropy):
    """Mutual information of prediction and dropout, in nats; rounding errors below 0 become 0."""
    return tf.maximum(entropy(mean) - mean_entropy, 0.0)


# The choices of --uncertainty.
MEASURES = {
    # Welford's update: the passes are not stored, and a small variance is not lost to rounding.
    "variance": Measure(lambda pred, before, after: (pred - before) * (pred - after), lambda mean, average: average),
    "entropy": Measure(None, lambda mean, average: entropy(mean)),
    "bald": Measure(lambda pred, before, after: entropy(pred), mutual_information),
}


def mc_dropout(
    model, images, passes, seed, keys=None, batch_size=16, mean=0.0, std=1.0, measure="variance", xla=False, reduce=None
):
    """Mean and uncertainty map of `passes` stochastic predictions of each image (the paper's section 2 and Fig. 1).

    images: uint8 or float32 (N, H, W, C). The network's input is (images - mean) / std; mean and std are one float or
    one per channel. Returns (mean, uncertainty), float32 (N, H, W) each. Raises ValueError if passes is below 1.
    measure: `variance`, the population variance of a pixel's predictions, as in the paper; `entropy`, the entropy of
    their mean, in nats; or `bald`, the mutual information of prediction and dropout, which is that entropy minus the
    mean entropy of the predictions. keys: an int per image that identifies it, such as its position in the data set;
    without keys its pixels do. The dropout mask of a pass depends only on (seed, the image's key, the number of the
    pass), not on batch size, order, other images or the number of devices. batch_size: images per device at a time.
    xla: compile with XLA, which takes some ten seconds, once; every batch is then filled up to `batch_size`. reduce: a
    function of the two maps' tensors to a tuple of tensors with a row per image, which are returned in their place.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    images = np.ascontiguousarray(images, None if images.dtype == np.uint8 else np.float32)
    image_seeds = _image_seeds(images if keys is None else np.asarray(keys, np.int64), seed)
    constants = np.int64(passes), np.atleast_1d(np.float32(mean)), np.atleast_1d(np.float32(std))
    if not len(images):
        return tuple(np.empty((2, *images.shape[:3]), np.float32))
    step = batch_size * model.distribute_strategy.num_replicas_in_sync
    with _one_at_a_time:  # not twice, by threads
        sample = _sampler(model, images.dtype, measure, xla, reduce)

    def compute(start):
        batch = [values[start : start + step] for values in (images, image_seeds)]
        count = len(batch[0])
        if xla:
            batch = [filled_up(values, step) for values in batch]
        return [kind[:count] for kind in _on_all_devices(model, sample, *batch, constants)]

    starts = range(0, len(images), step)
    # On a GPU the results of a batch are fetched during the next one.
    results = map_in_order(compute, starts, workers=2) if xla else map(compute, starts)
    return tuple(np.concatenate(kind) for kind in zip(*results))


_one_at_a_time = threading.Lock()


def filled_up(values, count):
    """Fill an array up to this length with zeros, because XLA compiles anew for every length."""
    return np.pad(values, [(0, count - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _on_all_devices(model, sample, images, image_seeds, constants):
    """The results for these images, which are split among the devices of the model's strategy."""
    strategy = model.distribute_strategy
    maps = sample(*share_out(strategy, images, image_seeds), *map(tf.constant, constants))
    return [np.concatenate(strategy.experimental_local_results(kind)) for kind in maps]


def _image_seeds(names, seed):
    """An int64 for each image, from the seed and the image's name, which is its pixels or its key."""
    salt = int(seed).to_bytes(8, "little", signed=True)
    return np.frombuffer(b"".join(blake2b(name.tobytes(), digest_size=8, salt=salt).digest() for name in names), "<i8")


@functools.lru_cache(maxsize=4)
def _sampler(model, dtype, measure, xla, reduce):
    """A compiled function (images, image_seeds, passes, mean, std) -> (mean, uncertainty), or what `reduce` makes of
    them, for images of this dtype."""
    of_pass, of_all = MEASURES[measure]
    prepare = _decoder_passes(model) if _is_build_unet(model) else _whole_network_passes(model)

    def sample(images, image_seeds, passes, mean, std):
        normalised = tf.ensure_shape((tf.cast(images, tf.float32) - mean) / std, images.shape)
        one_pass = prepare(normalised, image_seeds)
        mean = total = tf.zeros(tf.shape(images)[:3])
        for number in tf.range(passes):
            prediction = one_pass(number)
            before = mean
            mean += (prediction - mean) / tf.cast(number + 1, tf.float32)
            if of_pass:
                total += of_pass(prediction, before, mean)
        maps = mean, of_all(mean, total / tf.cast(passes, tf.float32))
        return reduce(*maps) if reduce else maps

    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync > 1:
        return tf.function(lambda *batch: strategy.run(sample, batch), reduce_retracing=True)
    image, channels = tf.TensorSpec((None, *model.input_shape[1:]), dtype), tf.TensorSpec([None], tf.float32)
    image_seeds, passes = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)
    return compiled(sample, "Monte Carlo passes", xla, input_signature=[image, image_seeds, passes, channels, channels])


def _is_build_unet(model):
    """Whether `build_unet` makes exactly this network, so that its passes may be rearranged."""
    try:
        return model.get_config() == build_unet(**unet_settings(model)).get_config()
    except (ValueError, AttributeError):  # other layers, another size
        return False


def _dropout_masks(shape, rate, image_seeds, number):
    """The units of each image that pass `number` keeps, bool (N, *shape)."""
    seeds = tf.stack([image_seeds, tf.fill(tf.shape(image_seeds), number)], 1)
    if on_gpu():
        return kept_units_of_images(shape, rate, seeds)
    return tf.map_fn(lambda seed: kept_units(shape, rate, seed), seeds, fn_output_signature=tf.bool)


class _KnownDropout(layers.Dropout):
    """Dropout for `_whole_network_passes`, which sets the seeds and the number of the pass."""

    image_seeds = number = None

    def call(self, inputs, training=False):
        masks = _dropout_masks(inputs.shape[1:], self.rate, self.image_seeds, self.number)
        return inputs / tf.cast(1.0 - self.rate, inputs.dtype) * tf.cast(masks, inputs.dtype)


def _whole_network_passes(model):
    """The plain sampler, for any network with dropout: each pass runs the whole network. See `_sampler`."""

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
    """The fast sampler, for `build_unet`: the same passes, by its `halves`. The encoder runs once per image, because
    dropout comes after it. See `_sampler`."""
    dropout, (encode, decode) = model.get_layer("dropout"), halves(model, on_gpu())

    def prepare(images, image_seeds):
        bottleneck, rest = encode(images)
        bottleneck /= tf.cast(1.0 - dropout.rate, bottleneck.dtype)

        def one_pass(number):
            masks = _dropout_masks(bottleneck.shape[1:], dropout.rate, image_seeds, number)
            return decode(bottleneck * tf.cast(masks, bottleneck.dtype), rest)[..., 0]

        return one_pass

    return prepare
