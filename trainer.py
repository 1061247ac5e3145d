"""The network of a run: batches, augmentation, the training step, checkpoint, scoring, evaluation.

Nothing here knows the loop.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import h5py
import numpy as np

import ceal
from data import normalise
from run_folder import read_record
from sampler import mc_dropout
from unet import (
    LOSSES,
    build_unet,
    count_parameters,
    halves,
    keras,
    layers,
    load_unet,
    load_weights,
    print_devices,
    save_unet,
    save_weights,
    share_out,
    tf,
)
from utils import UserError, derived_seed, in_one_line, map_in_order, naming, segmentation_metrics, track

# --------------------------------------------------------------------------------------------- augmentation and batches


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


# ----------------------------------------------------------------------------------------------------------- a training

WARM_UP = 0.05  # of a training: the Dice loss collapses under large first steps


def learning_rate(schedule, done):
    """The learning rate as a share of the highest, when this share of the training's steps is done: 1 throughout as
    published, or up in the first twentieth and down along a cosine to 0, so that the training ends settled."""
    if schedule == "constant":
        return 1.0
    return min(1.0, (done + 0.001) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))


def training_step(model):
    """A compiled function (images, targets) that trains the network of `build_unet` on this batch, of which each device
    has a share. It is Keras' own step, by the network's `halves`: the same gradients to rounding."""
    dropout, (encode, decode) = model.get_layer("dropout"), halves(model)

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


# ------------------------------------------------------------------------------------------------- the network of a run


def prepare(config):
    """Print the devices, switch deterministic operations on if the Config says so, and check the memory.

    Raises UserError if the machine cannot hold such a network."""
    print_devices()
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    if config.deterministic == "yes" or (config.deterministic == "auto" and not on_gpu):
        tf.config.experimental.enable_op_determinism()
    needed = 16 * count_parameters(1, config.filters)  # a weight, its gradient and Adam's two moments, 4 bytes each
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--filters {config.filters}: training such a network takes {needed / 1e9:,.0f} GB of memory, and there "
            f"are {memory / 1e9:,.0f} GB; use fewer"
        )


@contextlib.contextmanager
def memory_errors(config):
    """Turn TensorFlow's error for too little memory into a UserError."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise UserError(
            f"--batch-size {config.batch_size} --filters {config.filters}: not enough memory; lower one of them, or "
            "the images' size in data.py, and give another --run"
        )


class Trainer:
    """The network of a run with what it needs to see: its data and their normalisation."""

    def __init__(self, config, dataset, mean, std):
        self.config, self.dataset, self.mean, self.std = config, dataset, mean, std
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        several = config.devices == "all" and len(devices) > 1
        if several and config.batch_size < len(devices):
            raise UserError(
                f"--batch-size {config.batch_size} is too small to be shared out among {len(devices)} devices"
            )
        strategy = (
            tf.distribute.MirroredStrategy([d.name for d in devices]) if several else tf.distribute.get_strategy()
        )
        keras.utils.set_random_seed(derived_seed(config.seed, "weights"))
        size = dataset.height, dataset.width, dataset.channels
        with strategy.scope():
            self.model = build_unet(*size, config.filters, config.dropout, config.precision, config.initializer)
            # XLA and several replicas do not go together.
            jit_compile = False if several else "auto"
            optimizer = keras.optimizers.Adam(config.learning_rate)
            if config.precision == "float16":  # in which small gradients are 0
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            self.model.compile(optimizer, LOSSES[config.loss], jit_compile=jit_compile)
            self.model.optimizer.build(self.model.trainable_variables)
        self.step = training_step(self.model)
        run = Path(config.run)
        self.checkpoint, self.record = Checkpoint(self.model, run), run / ".scoring.jsonl"
        self.leftovers = self.checkpoint.path, self.record  # of no use after the iteration
        self.chunk = 16 * strategy.num_replicas_in_sync  # images that are scored at a time

    def images(self, positions):
        """The network's input for these positions: float32 (n, H, W, C)."""
        return normalise(self.dataset.images(positions), self.mean, self.std)

    def batches(self, positions, labels, iteration, first=0):
        """The `training_batches` from number `first` on of these images with their labels, a list of (H, W) in
        [0, 1]; augmented if iteration is 0, or always with --augment all. Each epoch has an order of its own, and its
        batches differ in size by one at most: no step on a few images, and a share for every device. Images are read
        from the data file batch by batch, so that memory does not limit their number."""
        seed, count = derived_seed(self.config.seed, iteration, "training"), len(positions)
        epoch_steps, last = self.config.epoch_steps(count), self.config.training_steps(count, iteration)

        def read(number):
            epoch, step = divmod(int(number), epoch_steps)
            order = np.random.default_rng(derived_seed(seed, epoch)).permutation(count)
            numbers = order[step * count // epoch_steps : (step + 1) * count // epoch_steps]
            targets = np.stack([labels[n] for n in numbers], dtype=np.float32)[..., None]
            return self.images(positions[numbers]), targets

        augmented = iteration == 0 or self.config.augment == "all"
        strong = self.config.augmentation == "strong"
        augment = augmentation(self.config.rotation, self.config.width_shift, seed, strong) if augmented else None
        return training_batches(read, first, last, augment)

    def load(self, path):
        """Go on from the weights, and the optimizer's state, that an iteration left."""
        try:
            load_unet(path)  # which says what is wrong with the file
            load_weights(self.model, path)  # with the optimizer's state
        except (UserError, ValueError, UserWarning) as error:
            raise UserError(
                f"{path}: not as train.py wrote it ({in_one_line(error)}); move this iteration and all later ones away "
                "to do them anew"
            )

    def fit(self, positions, labels, iteration):
        """Train on these images with their labels: the initial training if iteration is 0. A training that was
        interrupted goes on from its Checkpoint."""
        dropout = self.model.get_layer("dropout").seed_generator
        dropout_seed = derived_seed(self.config.seed, iteration, "dropout")
        first, last = self.checkpoint.load(iteration), self.config.training_steps(len(positions), iteration)
        highest = self.config.highest_rate(iteration)
        batches = self.batches(positions, labels, iteration, first)
        steps = track(batches, f"iteration {iteration}: training steps", last - first)
        for number, batch in enumerate(steps, first):
            restart(dropout, dropout_seed, number)
            self.model.optimizer.learning_rate = highest * learning_rate(self.config.schedule, number / last)
            self.step(*share_out(self.model.distribute_strategy, *batch))
            self.checkpoint.save_now_and_then(iteration, number + 1)
        self.require_finite(*self.model.get_weights())

    def require_finite(self, *arrays):
        """Raise UserError if a number in them is not."""
        if not all(np.isfinite(array).all() for array in arrays):
            rates = f"{self.config.learning_rate:g} and --active-learning-rate {self.config.active_learning_rate:g}"
            raise UserError(
                f"--learning-rate {rates}: the training broke down, its weights or predictions are no longer finite; "
                "lower them, or choose another --precision, and give another --run"
            )

    def uncertainty(self, positions, iteration, images=None, passes=None):
        """Mean and uncertainty map of the iteration's Monte Carlo passes: float32 (n, H, W) each. images: the data
        set's at these positions, where they have been read already; passes: so many of the first instead of all."""
        images = self.dataset.images(positions) if images is None else images
        passes, seed = passes or self.config.passes, derived_seed(self.config.seed, iteration, "passes")
        normalisation, measure = {"mean": self.mean, "std": self.std}, self.config.uncertainty
        return mc_dropout(self.model, images, passes, seed, keys=positions, measure=measure, **normalisation)

    def score(self, pool, iteration, record=None):
        """Score and Dice of each unlabelled image of the ceal.Pool: float64 (n,) both, in the order of
        `pool.unlabelled`; a Dice is NaN where there is no mask. The prediction that both rest on is the mean of the
        passes.

        A chunk's images are read before, and its maps rated after, while other chunks are in the network. record: a
        file that takes what has been scored, so that a scoring that was interrupted goes on."""

        def read(positions):
            return positions, self.dataset.images(positions)

        def rate(maps):
            positions, mean, uncertainty = maps
            scores = [ceal.uncertainty_score(u, m, self.config.distance) for u, m in zip(uncertainty, mean)]
            dice = segmentation_metrics(self.dataset.masks(positions), mean > 0.5)["dice"]
            return scores, np.where(self.dataset.has_mask[positions], dice, np.nan).tolist()

        done = read_record(record, iteration)
        # Chunks may have had another size before, on other devices.
        chunks = in_chunks(pool.unlabelled[sum(len(scores) for scores, _ in done) :], self.chunk)
        pictures = map_in_order(read, chunks, workers=1)
        maps = ((positions, *self.uncertainty(positions, iteration, images)) for positions, images in pictures)
        for rated in track(map_in_order(rate, maps), f"iteration {iteration}: scoring the pool", len(chunks)):
            done.append(rated)
            if record:
                with naming(record), open(record, "a") as file:
                    file.write(json.dumps([iteration, *rated]) + "\n")
        scores, dice = (np.concatenate(values) for values in zip(*done))
        return scores, dice

    def save(self, path):
        """Write the weights, and what they need to be used, to `path`."""
        save_unet(self.model, path, self.mean, self.std)

    def proposals(self, positions, iteration):
        """Yield the (mean, uncertainty map), float32 (H, W), of `uncertainty` for each of these positions."""
        for some in in_chunks(positions, self.chunk):
            yield from zip(*self.uncertainty(some, iteration))

    def predict(self, positions):
        """The network's probabilities with dropout off, float32 (n, H, W)."""
        return self.model.predict(self.images(positions), verbose=0)[..., 0]

    def warn_if_collapsed(self, positions):
        """Warn if the network predicts every pixel of these images to be skin, or every pixel to be lesion."""
        warn_of_collapse(self.predict(positions) > 0.5)

    def evaluate(self, positions):
        """Each metric at a threshold of 0.5 of each of these images, a dict of float64 (n,), empty without images;
        warns of a collapsed network."""
        if not len(positions):
            return {}
        metrics, lesion = [], []
        for some in in_chunks(positions, 64):
            prediction = self.predict(some)
            self.require_finite(prediction)
            prediction = prediction > 0.5
            metrics.append(segmentation_metrics(self.dataset.masks(some), prediction))
            lesion.append(prediction.mean())
        warn_of_collapse(lesion)
        return {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}


def in_chunks(positions, size):
    """Cut positions into pieces of at most `size`, so that memory does not grow with their number."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def warn_of_collapse(lesion):
    """Warn if every pixel or no pixel is lesion. lesion: bool predictions, or shares of lesion pixels."""
    if np.max(lesion) == 0 or np.min(lesion) == 1:
        print(f"warning: the network calls every pixel {'skin' if np.max(lesion) == 0 else 'lesion'}: it collapsed")
