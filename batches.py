"""Training batches: their order, augmentation, and how they reach the device.

Nothing here trains a network.
"""

import numpy as np

from data import normalise
from devices import keras, tf
from sampler import filled_up
from synthetic import draw_artefacts
from utils import derived_seed, map_in_order

layers = keras.layers


class ColourJitter(layers.Layer):
    """Changes each image's contrast by up to a fifth and the brightness of each channel by up to 0.3, at random, in a
    batch (N, H, W, C) of normalised images. The last channel is the mask and does not change."""

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


class WildColours(layers.Layer):
    """Changes colours and light at random far more than ColourJitter: saturation, contrast, the brightness of all and
    of each channel, light that falls off to one side and to the corners, and grain. Batches: as for ColourJitter."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.generator = seed, keras.random.SeedGenerator(seed)

    def call(self, inputs):
        images, masks = inputs[..., :-1], inputs[..., -1:]
        count, height, width, channels = tf.shape(images)[0], *images.shape[1:]

        def draw(low, high, channels=1):
            return keras.random.uniform((count, 1, 1, channels), low, high, seed=self.generator)

        grey = tf.reduce_mean(images, -1, keepdims=True)
        images = grey + draw(0.3, 1.6) * (images - grey)
        mean = tf.reduce_mean(images, [1, 2], keepdims=True)
        images = mean + draw(0.6, 1.5) * (images - mean)
        images += draw(-0.6, 0.6) + draw(-0.5, 0.5, channels)
        y, x = tf.linspace(-1.0, 1.0, height)[:, None, None], tf.linspace(-1.0, 1.0, width)[None, :, None]
        images += draw(-0.4, 0.4) * y + draw(-0.4, 0.4) * x + draw(-0.6, 0.2) * (y**2 + x**2)
        images += draw(0.0, 0.2) * keras.random.normal(tf.shape(images), seed=self.generator)
        return tf.concat([images, masks], -1)


# How much more of the scene a zoomed image shows, at least and at most, as a share of its height and width.
ZOOMS = {"strong": (-0.15, 0.15), "far": (-0.15, 1.0), "wild": (-0.4, 0.5)}


def augmentation(rotation, width_shift, seed, kind="paper"):
    """Keras layers for a batch float32 (N, H, W, C) with the mask as last channel. Each image is changed at random:
    rotated by up to `rotation` degrees either way, shifted by up to `width_shift` of its width, mirrored. If `kind` is
    `strong`, it is also shifted by the same share of its height, zoomed by up to 15 %, mirrored vertically and changed
    in colour. `far` is the same, but up to twice as much of the scene is shown, so that lesions are smaller; `wild` has
    zooms of 0.6 to 1.5 and WildColours."""
    strong = kind != "paper"
    height_shift = width_shift if strong else 0.0
    movements = [
        layers.RandomRotation(rotation / 360, fill_mode="nearest", seed=derived_seed(seed, "rotation")),
        layers.RandomTranslation(height_shift, width_shift, fill_mode="nearest", seed=derived_seed(seed, "shift")),
        layers.RandomFlip("horizontal_and_vertical" if strong else "horizontal", seed=derived_seed(seed, "flip")),
    ]
    if strong:
        colours = WildColours if kind == "wild" else ColourJitter
        zoom = layers.RandomZoom(ZOOMS[kind], fill_mode="nearest", seed=derived_seed(seed, "zoom"))
        movements += [zoom, colours(derived_seed(seed, "colours"))]
    return keras.Sequential(movements)


def restart(generator, seed, number):
    """Set the state of a keras.random.SeedGenerator to this seed and number."""
    generator.state.assign(tf.cast(tf.stack([tf.cast(seed, tf.int64), number]), generator.state.dtype))


def augmented(pictures, masks, number, augment):
    """Batch `number` after augmentation by a keras.Sequential: images (b, H, W, C), targets (b, H, W, 1), float32."""
    for layer in augment.layers:
        restart(layer.generator, layer.seed, 100 * number)  # a layer may draw several times
    moved = augment(tf.concat([pictures, masks], -1), training=True)
    # Masks become two-valued again after interpolation; soft pseudo-labels stay soft.
    two_valued = tf.reduce_all(masks == tf.round(masks), [1, 2, 3], keepdims=True)
    return moved[..., :-1], tf.where(two_valued, tf.round(moved[..., -1:]), moved[..., -1:])


def training_batches(read, first, last, augment=None):
    """A tf.data.Dataset of the batches `first` to `last` - 1. Each is prepared during the training step before it.

    read: a function from the number of a batch to images, float32 (b, H, W, C), normalised, and targets, float32
    (b, H, W, 1) in [0, 1]. augment: a keras.Sequential that transforms image and mask together, with the mask as last
    channel. The result depends only on the number of the batch, not on `first`.
    """
    shapes = [(None, *array.shape[1:]) for array in read(first)]

    def batch(number):
        arrays = tf.numpy_function(read, [number], (tf.float32, tf.float32))
        pictures, masks = map(tf.ensure_shape, arrays, shapes)
        return augmented(pictures, masks, number, augment) if augment else (pictures, masks)

    # Sequential, because the layers have a random state; each operation uses all cores.
    return tf.data.Dataset.range(first, last).map(batch).prefetch(2)


class Batches:
    """The batches of a training: which images are in which one, and the images and targets themselves.

    Each epoch has its own order. Batch sizes in an epoch differ by at most one, so that no step uses only a few images
    and every device gets a share. A batch depends only on its number, not on the first one that is asked for.

    dataset: a data.Dataset, read batch by batch, so that memory does not limit the number of images; mean, std: of the
    normalisation, a float per channel each; positions: int (n,) in the data set; labels: a list of n (H, W) in [0, 1];
    epoch_steps: batches in an epoch; augment: a keras.Sequential that transforms image and mask together, with the mask
    as last channel, or None; artefacts: the share of images onto which synthetic.draw_artefacts draws.
    """

    def __init__(self, dataset, mean, std, positions, labels, epoch_steps, seed, augment=None, artefacts=0.0):
        self.dataset, self.mean, self.std = dataset, mean, std
        self.positions, self.labels, self.epoch_steps = positions, labels, epoch_steps
        self.seed, self.augment, self.artefacts = seed, augment, artefacts

    def members(self, number):
        """The images of a batch, as numbers of `positions`."""
        (epoch, step), count = divmod(int(number), self.epoch_steps), len(self.positions)
        order = np.random.default_rng(derived_seed(self.seed, epoch)).permutation(count)
        return order[step * count // self.epoch_steps : (step + 1) * count // self.epoch_steps]

    def images(self, members, number):
        """The images of batch `number`, uint8 (b, H, W, C), with artefacts."""
        images = self.dataset.images(self.positions[members])
        rng = np.random.default_rng(derived_seed(self.seed, "artefacts", int(number))) if self.artefacts else None
        for image, member in zip(images, members) if self.artefacts else ():
            if rng.random() < self.artefacts:
                image[:] = draw_artefacts(rng, image, self.labels[member] > 0.5)
        return images

    def targets(self, members):
        """Their labels, float32 (b, H, W, 1)."""
        return np.stack([self.labels[n] for n in members], dtype=np.float32)[..., None]

    def on_cpu(self, first, last):
        """The `training_batches` from `first` to `last` - 1."""

        def read(number):
            members = self.members(number)
            images = normalise(self.images(members, number), self.mean, self.std)
            return images, self.targets(members)

        return training_batches(read, first, last, self.augment)

    def on_gpu(self, first, last, size, images=None):
        """Yields the batches `first` to `last` - 1, normalised and augmented on the GPU and filled up to `size` images:
        images, targets, and float32 (size, 1, 1, 1), 1 for an image and 0 for what fills up. The same batches as
        `on_cpu`, up to rounding.

        images: the whole data set in the GPU's memory, uint8 (N, H, W, C); without it, threads read the batches. It
        cannot be combined with artefacts."""
        resident = images is not None
        labels = tf.constant(self.targets(range(len(self.labels)))) if resident else None

        def read(number):
            members = self.members(number)
            real = np.float32(np.arange(size) < len(members)).reshape(-1, 1, 1, 1)
            if resident:
                members = filled_up(members, size)
                return self.positions[members], members, real, number
            pictures = self.images(members, number)
            return filled_up(pictures, size), filled_up(self.targets(members), size), real, number

        @tf.function(reduce_retracing=True)  # without XLA, which cannot move images
        def prepare(pictures, masks, number):
            if resident:
                pictures, masks = tf.gather(images, pictures), tf.gather(labels, masks)
            pictures = (tf.cast(pictures, tf.float32) - np.float32(self.mean)) / np.float32(self.std)
            return augmented(pictures, masks, number, self.augment) if self.augment else (pictures, masks)

        def make(raw):
            pictures, masks, real, number = raw
            return *prepare(*map(tf.constant, (pictures, masks)), tf.constant(number, tf.int64)), tf.constant(real)

        numbers = range(first, last)
        raw = map(read, numbers) if resident else map_in_order(read, numbers)
        # One thread, ahead of the training steps, because it waits for the GPU in between.
        return map_in_order(make, raw, workers=1)
