"""The network of a run: batches, augmentation, the training step, checkpoint, scoring, evaluation.

The loop over the iterations is in train.py.
"""

import json
import os
import shlex
import time
from pathlib import Path

import numpy as np

import ceal
from data import normalise
from run_folder import CHECKPOINT, read_record
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
    tensorflow_errors,
    tf,
)
from utils import (
    FileInUse,
    UserError,
    derived_seed,
    in_one_line,
    map_in_order,
    naming,
    open_hdf5,
    segmentation_metrics,
    track,
)

# --------------------------------------------------------------------------------------------- augmentation and batches


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


def augmentation(rotation, width_shift, seed, strong=False):
    """Keras layers for a batch float32 (N, H, W, C) with the mask as last channel. Each image is changed at random:
    rotated by up to `rotation` degrees either way, shifted by up to `width_shift` of its width, mirrored; if `strong`,
    also shifted by the same share of its height, zoomed by up to 15 %, mirrored vertically and changed in colour."""
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
    """A tf.data.Dataset of the batches `first` to `last` - 1. Each is prepared during the training step before it.

    read: a function from the number of a batch to images, float32 (b, H, W, C), normalised, and targets, float32
    (b, H, W, 1) in [0, 1]. augment: a keras.Sequential that transforms image and mask together, with the mask as last
    channel. The result depends only on the number of the batch, not on `first`.
    """
    shapes = [(None, *array.shape[1:]) for array in read(first)]

    def batch(number):
        pictures, masks = map(tf.ensure_shape, tf.numpy_function(read, [number], (tf.float32, tf.float32)), shapes)
        if augment:
            for layer in augment.layers:
                restart(layer.generator, layer.seed, 100 * number)  # a layer may draw several times
            moved = augment(tf.concat([pictures, masks], -1), training=True)
            # Masks become two-valued again after interpolation; soft pseudo-labels stay soft.
            two_valued = tf.reduce_all(masks == tf.round(masks), [1, 2, 3], keepdims=True)
            pictures, masks = moved[..., :-1], tf.where(two_valued, tf.round(moved[..., -1:]), moved[..., -1:])
        return pictures, masks

    # Sequential, because the layers have a random state; each operation uses all cores.
    return tf.data.Dataset.range(first, last).map(batch).prefetch(2)


def restart(generator, seed, number):
    """Set the state of a keras.random.SeedGenerator to this seed and number."""
    generator.state.assign(tf.cast(tf.stack([tf.cast(seed, tf.int64), number]), generator.state.dtype))


# ----------------------------------------------------------------------------------------------------------- a training

WARM_UP = 0.05  # share of a training in which the rate rises; after large first steps the Dice loss collapses


def learning_rate(schedule, done):
    """The learning rate as a share of the highest one, when the share `done` of the training's steps is done. schedule:
    `constant` is 1, as published; `cosine` rises in the first twentieth and falls along a cosine to 0."""
    if schedule == "constant":
        return 1.0
    return min(1.0, (done + 0.001) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))


def training_step(model):
    """A compiled function (images, targets) that trains the network of `build_unet` on a batch from `share_out`, by the
    network's `halves`. The gradients equal those of Keras' own step up to rounding."""
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
    """An unfinished training, saved in the run's folder: weights, optimizer's state and number of steps done."""

    EVERY = 60  # seconds of training that a crash costs at most

    def __init__(self, model, run):
        self.model, self.path, self.saved = model, run / CHECKPOINT, time.monotonic()

    def save_now_and_then(self, iteration, steps):
        """Save if the last save was more than EVERY seconds ago."""
        if time.monotonic() - self.saved > self.EVERY:
            save_weights(self.model, self.path, iteration=iteration, steps=steps)
            self.saved = time.monotonic()

    def load(self, iteration):
        """Restore the unfinished training of this iteration. Returns the steps done, 0 if nothing was saved. Raises
        UserError if the file is damaged."""
        self.saved = time.monotonic()
        if not self.path.exists():
            return 0
        try:
            with open_hdf5(self.path) as file:
                found, steps = int(file.attrs["iteration"]), int(file.attrs["steps"])
            if found != iteration:
                return 0
            load_weights(self.model, self.path)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, UserWarning) as error:
            reason = in_one_line(error)
            raise UserError(f"{self.path}: damaged ({reason}); remove it to repeat this iteration's training")
        return steps


# ------------------------------------------------------------------------------------------------- the network of a run


def prepare(config):
    """Print the devices, switch on deterministic operations if the Config says so, and check the memory.

    Raises UserError if the machine has too little memory for the network."""
    print_devices()
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    if config.deterministic == "yes" or (config.deterministic == "auto" and not on_gpu):
        tf.config.experimental.enable_op_determinism()
    needed = 16 * count_parameters(1, config.filters)  # a weight, its gradient and Adam's two moments, 4 bytes each
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--filters {config.filters}: training this network takes {needed / 1e9:,.0f} GB of memory, and this "
            f"machine has {memory / 1e9:,.0f} GB; use fewer filters"
        )


def with_less_memory(config):
    """How a training goes on if there is not enough memory for it: a remedy for `tensorflow_errors`."""
    command = f"python train.py --run {shlex.quote(config.run)}"
    if config.batch_size == 1:
        return f"end other programs that use memory, or use a machine with more, and go on with: {command}"
    command += f" --batch-size {config.batch_size // 2}"
    return f"--batch-size {config.batch_size} is too large for this machine; go on with: {command}"


class Trainer:
    """The network of a run with its Dataset and the normalisation, mean and std: a float per channel each."""

    def __init__(self, config, dataset, mean, std):
        self.config, self.dataset, self.mean, self.std = config, dataset, mean, std
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        several = config.devices == "all" and len(devices) > 1
        if several and config.batch_size < len(devices):
            raise UserError(
                f"--batch-size {config.batch_size}: too few images for {len(devices)} devices; give at least "
                f"{len(devices)}, or --devices one"
            )
        strategy = (
            tf.distribute.MirroredStrategy([d.name for d in devices]) if several else tf.distribute.get_strategy()
        )
        keras.utils.set_random_seed(derived_seed(config.seed, "weights"))
        size = dataset.height, dataset.width, dataset.channels
        with strategy.scope():
            self.model = build_unet(*size, config.filters, config.dropout, config.precision, config.initializer)
            # XLA does not work with several replicas.
            jit_compile = False if several else "auto"
            optimizer = keras.optimizers.Adam(config.learning_rate)
            if config.precision == "float16":  # small gradients would become 0
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            self.model.compile(optimizer, LOSSES[config.loss], jit_compile=jit_compile)
            self.model.optimizer.build(self.model.trainable_variables)
        self.step = training_step(self.model)
        run = Path(config.run)
        self.checkpoint, self.record = Checkpoint(self.model, run), run / ".scoring.jsonl"
        self.leftovers = self.checkpoint.path, self.record  # not needed after the iteration
        self.chunk = 16 * strategy.num_replicas_in_sync  # images that are scored at a time

    def images(self, positions):
        """The network's input for these positions: float32 (n, H, W, C)."""
        return normalise(self.dataset.images(positions), self.mean, self.std)

    def batches(self, positions, labels, iteration, first=0):
        """The `training_batches` of these images from number `first` on. labels: a list of (H, W) in [0, 1]. They are
        augmented as --augment says. Each epoch has its own order. Batch sizes in an epoch differ by at most one, so
        that no step uses only a few images and every device gets a share. Images are read from the data file batch by
        batch, so that memory does not limit their number."""
        seed, count = derived_seed(self.config.seed, iteration, "training"), len(positions)
        epoch_steps, last = self.config.epoch_steps(count), self.config.training_steps(count, iteration)

        def read(number):
            epoch, step = divmod(int(number), epoch_steps)
            order = np.random.default_rng(derived_seed(seed, epoch)).permutation(count)
            numbers = order[step * count // epoch_steps : (step + 1) * count // epoch_steps]
            targets = np.stack([labels[n] for n in numbers], dtype=np.float32)[..., None]
            return self.images(positions[numbers]), targets

        augmented = {"initial": iteration == 0, "all": True, "none": False}[self.config.augment]
        strong = self.config.augmentation == "strong"
        augment = augmentation(self.config.rotation, self.config.width_shift, seed, strong) if augmented else None
        return training_batches(read, first, last, augment)

    def load(self, path):
        """Load the weights and the optimizer's state that an iteration saved. Raises UserError if damaged."""
        try:
            load_unet(path)  # its error says what is wrong with the file
            load_weights(self.model, path)  # with the optimizer's state
        except FileInUse:
            raise
        except (UserError, ValueError, UserWarning) as error:
            raise UserError(
                f"{path}: not as train.py wrote it ({in_one_line(error)}); move this iteration and all later ones away "
                "to do them anew"
            )

    def fit(self, positions, labels, iteration):
        """Train on these images and labels; iteration 0 is the initial training. An interrupted training continues from
        its Checkpoint. Raises UserError if the training diverges."""
        dropout = self.model.get_layer("dropout").seed_generator
        dropout_seed = derived_seed(self.config.seed, iteration, "dropout")
        first, last = self.checkpoint.load(iteration), self.config.training_steps(len(positions), iteration)
        highest = self.config.highest_rate(iteration)
        batches = self.batches(positions, labels, iteration, first)
        steps = track(batches, f"iteration {iteration}: training steps", last - first)
        with tensorflow_errors(with_less_memory(self.config)):
            for number, batch in enumerate(steps, first):
                restart(dropout, dropout_seed, number)
                self.model.optimizer.learning_rate = highest * learning_rate(self.config.schedule, number / last)
                self.step(*share_out(self.model.distribute_strategy, *batch))
                self.checkpoint.save_now_and_then(iteration, number + 1)
        self.require_finite(*self.model.get_weights())

    def require_finite(self, *arrays):
        """Raise UserError if a number in these arrays is not finite."""
        if not all(np.isfinite(array).all() for array in arrays):
            rates = f"{self.config.learning_rate:g} and --active-learning-rate {self.config.active_learning_rate:g}"
            raise UserError(
                f"--learning-rate {rates}: the training diverged, its weights or predictions are not finite; lower "
                "them, or choose another --precision, and give another --run"
            )

    def uncertainty(self, positions, iteration, images=None, passes=None):
        """Mean and uncertainty map of the iteration's Monte Carlo passes: float32 (n, H, W) each. images: those at
        these positions, if they have been read already; passes: use only this many of the first passes."""
        images = self.dataset.images(positions) if images is None else images
        passes, seed = passes or self.config.passes, derived_seed(self.config.seed, iteration, "passes")
        normalisation, measure = {"mean": self.mean, "std": self.std}, self.config.uncertainty
        return mc_dropout(self.model, images, passes, seed, keys=positions, measure=measure, **normalisation)

    def score(self, pool, iteration, record=None):
        """Score and Dice of each unlabelled image of the ceal.Pool: float64 (n,) each, in the order of
        `pool.unlabelled`. Both use the mean of the passes as prediction. The Dice is NaN if there is no mask.

        Threads read images and compute scores while the network works on another chunk. record: a file that takes the
        results of each chunk, so that an interrupted scoring continues."""

        def read(positions):
            return positions, self.dataset.images(positions)

        def rate(maps):
            positions, mean, uncertainty = maps
            scores = [ceal.uncertainty_score(u, m, self.config.distance) for u, m in zip(uncertainty, mean)]
            dice = segmentation_metrics(self.dataset.masks(positions), mean > 0.5)["dice"]
            return scores, np.where(self.dataset.has_mask[positions], dice, np.nan).tolist()

        done = read_record(record, iteration)
        # Recorded chunks may have another size, if the number of devices has changed.
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
        """Write the weights and the settings that they need to `path`."""
        save_unet(self.model, path, self.mean, self.std)

    def proposals(self, positions, iteration):
        """Yield the (mean, uncertainty map), float32 (H, W), of `uncertainty` for each of these positions."""
        for some in in_chunks(positions, self.chunk):
            yield from zip(*self.uncertainty(some, iteration))

    def predict(self, positions):
        """The network's probabilities with dropout off, float32 (n, H, W)."""
        return self.model.predict(self.images(positions), verbose=0)[..., 0]

    def warn_if_collapsed(self, positions):
        """Warn if the network predicts only skin, or only lesion, in all of these images."""
        warn_of_collapse(self.predict(positions) > 0.5)

    def evaluate(self, positions):
        """The metrics of each of these images at a threshold of 0.5: a dict of float64 (n,), empty without images.
        Warns if the network has collapsed. Raises UserError if a prediction is not finite."""
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
        print(f"warning: the network has collapsed: it predicts only {'skin' if np.max(lesion) == 0 else 'lesion'}")
