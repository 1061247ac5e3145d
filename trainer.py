"""The network of a run: the training step, checkpoint, scoring, evaluation.

The loop over the iterations is in train.py.
"""

import functools
import json
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ceal
import gpu_score
from batches import Batches, augmentation, restart
from data import normalise
from devices import compiled, gpu_memory, keras, on_gpu, share_out, tensorflow_errors, tf, use_devices
from run_folder import CHECKPOINT, read_record, write_test
from sampler import mc_dropout
from unet import LOSSES, build_unet, count_parameters, halves, load_unet, load_weights, save_unet, save_weights
from utils import (
    FileInUse,
    UserError,
    derived_seed,
    expected_agreement,
    in_one_line,
    map_in_order,
    naming,
    open_hdf5,
    segmentation_metrics,
    track,
)

# ----------------------------------------------------------------------------------------------------------- a training

WARM_UP = 0.05  # share of a training in which the rate rises; after large first steps the Dice loss collapses


def learning_rate(schedule, done):
    """The learning rate as a share of the highest one, when the share `done` of the training's steps is done. schedule:
    `constant` is 1, as published; `cosine` rises in the first twentieth and falls along a cosine to 0."""
    if schedule == "constant":
        return 1.0
    return min(1.0, (done + 0.001) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))


def training_step(model, xla=False):
    """A compiled function that trains the network of `build_unet` on a batch: images and targets from `share_out`, and
    on a GPU which of the images are real. Returns the loss. It uses the network's `halves`. The gradients equal those
    of Keras' own step up to rounding."""
    dropout, (encode, decode) = model.get_layer("dropout"), halves(model)

    def train(images, targets, *real):
        with tf.GradientTape() as tape:
            bottleneck, rest = encode(images)
            predictions = decode(dropout(bottleneck, training=True), rest)
            loss = model.loss(targets, predictions, *real)
            scaled = model.optimizer.scale_loss(loss)
        model.optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        return loss

    def step(*batch):
        losses = model.distribute_strategy.run(train, batch)
        return model.distribute_strategy.reduce("MEAN", losses, axis=None)

    return compiled(step, "training step", xla, reduce_retracing=True)


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
    """Choose and print the devices, switch on deterministic operations if the Config says so, and check the memory.

    Raises UserError if the machine has too little memory for the network."""
    use_devices(config.devices)
    if config.deterministic == "yes" or (config.deterministic == "auto" and not on_gpu()):
        tf.config.experimental.enable_op_determinism()
    needed = 16 * count_parameters(1, config.filters)  # a weight, its gradient and Adam's two moments, 4 bytes each
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--filters {config.filters}: training this network takes {needed / 1e9:,.0f} GB of memory, and this "
            f"machine has {memory / 1e9:,.0f} GB; use fewer filters"
        )


def with_less_memory(batch_size, command):
    """How a training goes on if there is not enough memory for it: a remedy for `tensorflow_errors`."""
    if batch_size == 1:
        return f"end other programs that use memory, or use a machine with more, and go on with: {command}"
    command += f" --batch-size {batch_size // 2}"
    return f"--batch-size {batch_size} is too large for this machine; go on with: {command}"


# XLA compiles a training step in some 30 s and saves some 8 ms of each; of the passes, in 10 s, 0.1 ms of each.
XLA_STEPS, XLA_PASSES = 4_000, 100_000


def xla_pays(config):
    """Whether XLA pays for the training steps, and for the Monte Carlo passes, of a run with this Config on a GPU. The
    same in every start of the run."""
    first, later = (config.training_steps(config.initial, iteration) for iteration in (0, 1))
    passes = config.iterations * config.pool * config.passes
    return first + config.iterations * later >= XLA_STEPS, passes >= XLA_PASSES


def images_at_a_time(memory, height, width, filters):
    """The number of images in a Monte Carlo pass: a power of 2 from 16 to 64, as a GPU with this memory, in bytes,
    can hold; 16 on a CPU, where it is 0."""
    room = memory / 4 / (64 * height * width * filters)  # an image: 16 float32 maps of the first level
    return next((count for count in (64, 32) if count <= room), 16)


class Scored(NamedTuple):
    """The results of a scoring: an array (n,) or a list each."""

    scores: object  # float64
    dice: object  # float64, of the prediction; NaN if there is no mask
    sizes: object  # int64, pixels of the predicted lesion
    agreement: object  # float64, utils.expected_agreement


class Trainer:
    """The network of a run with its Dataset and the normalisation, mean and std: a float per channel each."""

    cluster = None  # a cluster.Cluster that scores the pool in place of this process
    events = None  # an events.Events that takes each step's loss

    def __init__(self, config, dataset, mean, std, memory=None, folder=None):
        """memory: bytes of the GPU on which the run began, so that it goes on elsewhere in batches of the same size;
        folder: for what is unfinished, by default the run's."""
        self.config, self.dataset, self.mean, self.std = config, dataset, mean, std
        self.command = f"python train.py --run {shlex.quote(config.run)}"  # what continues a training
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
            network = config.filters, config.dropout, config.precision, config.initializer
            self.model = build_unet(*size, *network, standardise=config.normalisation == "image")
            decay = config.weight_average
            optimizer = keras.optimizers.Adam(config.learning_rate, use_ema=decay > 0, ema_momentum=decay)
            if config.precision == "float16":  # small gradients would become 0
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            # No XLA for predictions: it would compile anew for each number of images.
            self.model.compile(optimizer, LOSSES[config.loss], jit_compile=False)
            self.model.optimizer.build(self.model.trainable_variables)
        self.one_gpu = on_gpu() and not several  # XLA and batches of one size do not work with several replicas
        fast_step, self.fast_passes = (self.one_gpu and pays for pays in xla_pays(config))
        # XLA has no deterministic gradient of max-pooling.
        self.step = training_step(self.model, fast_step and config.deterministic != "yes")
        run = Path(folder or config.run)
        self.checkpoint, self.record = Checkpoint(self.model, run), run / ".scoring.jsonl"
        self.leftovers = self.checkpoint.path, self.record  # not needed after the iteration
        self.memory = min(memory or gpu_memory(), gpu_memory()) if on_gpu() else 0
        self.batch = images_at_a_time(self.memory, *size[:2], config.filters)  # in a Monte Carlo pass
        # Images that are scored at a time. On a GPU the results of a batch are fetched during the next one.
        self.chunk = (4 if self.one_gpu else strategy.num_replicas_in_sync) * self.batch

    def images(self, positions):
        """The network's input for these positions: float32 (n, H, W, C)."""
        return normalise(self.dataset.images(positions), self.mean, self.std)

    def batches(self, positions, labels, iteration, first=0):
        """The batches of batches.Batches from number `first` on, augmented as --augment says. labels: a list of (H, W)
        in [0, 1]."""
        seed, count = derived_seed(self.config.seed, iteration, "training"), len(positions)
        augmented = {"initial": iteration == 0, "all": True, "none": False}[self.config.augment]
        kind, artefacts = self.config.augmentation, self.config.artefacts if augmented else 0.0
        augment = augmentation(self.config.rotation, self.config.width_shift, seed, kind) if augmented else None
        steps, last = self.config.epoch_steps(count), self.config.training_steps(count, iteration)
        if (smallest := count // steps) < (devices := self.model.distribute_strategy.num_replicas_in_sync):
            raise UserError(
                f"--batch-size {self.config.batch_size}: {count} images make some batches of {smallest}, too few for "
                f"{devices} devices; give at least {2 * devices - 1}, or --devices one"
            )
        batches = Batches(self.dataset, self.mean, self.std, positions, labels, steps, seed, augment, artefacts)
        if not self.one_gpu:
            return batches.on_cpu(first, last)
        pixels = self.dataset.height * self.dataset.width
        fits = pixels * (len(self.dataset) * self.dataset.channels + 4 * count) < self.memory / 2  # labels: float32
        fits = fits and not artefacts  # they are drawn on the CPU
        return batches.on_gpu(first, last, min(self.config.batch_size, count), self.all_images if fits else None)

    @functools.cached_property
    def all_images(self):
        """The images of the whole data set in the GPU's memory, a uint8 tensor (N, H, W, C)."""
        return tf.constant(self.dataset.images(range(len(self.dataset))))

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
        earlier = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) - first  # of the iterations before
        with tensorflow_errors(with_less_memory(self.config.batch_size, self.command)):
            for number, batch in enumerate(steps, first):
                restart(dropout, dropout_seed, number)
                rate = highest * learning_rate(self.config.schedule, number / last)
                self.model.optimizer.learning_rate = rate
                loss = self.step(*share_out(self.model.distribute_strategy, *batch))
                if self.events:
                    self.events.step(earlier + number, loss, rate)
                self.checkpoint.save_now_and_then(iteration, number + 1)
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)  # with --weight-average
        self.require_finite(*self.model.get_weights())

    def require_finite(self, *arrays):
        """Raise UserError if a number in these arrays is not finite."""
        if not all(np.isfinite(array).all() for array in arrays):
            rates = f"{self.config.learning_rate:g} and --active-learning-rate {self.config.active_learning_rate:g}"
            raise UserError(
                f"--learning-rate {rates}: the training diverged, its weights or predictions are not finite; lower "
                "them, or choose another --precision, and give another --run"
            )

    def uncertainty(self, positions, iteration, images=None, passes=None, reduce=None):
        """Mean and uncertainty map of the iteration's Monte Carlo passes: float32 (n, H, W) each. images: those at
        these positions, if they have been read already; passes: use only this many of the first passes; reduce: as for
        mc_dropout."""
        images = self.dataset.images(positions) if images is None else images
        passes, seed = passes or self.config.passes, derived_seed(self.config.seed, iteration, "passes")
        normalisation, measure = {"mean": self.mean, "std": self.std}, self.config.uncertainty
        how = {"batch_size": self.batch, "measure": measure, "xla": self.fast_passes, "reduce": reduce}
        return mc_dropout(self.model, images, passes, seed, keys=positions, **how, **normalisation)

    def score(self, pool, iteration, record=None):
        """What is known of each unlabelled image of the ceal.Pool, in the order of `pool.unlabelled`, a Scored. The
        mean of the passes is the prediction.

        record: a file that takes the results of each chunk, so that an interrupted scoring continues."""
        done = read_record(record, iteration)
        count = sum(len(rated[0]) for rated in done)
        if count:
            print(f"{count} of {len(pool.unlabelled)} images are scored already", flush=True)
        # Recorded chunks may have another size, if the number of devices has changed.
        chunks = in_chunks(pool.unlabelled[count:], self.chunk)
        if self.cluster:
            found = self.cluster.rate(self, chunks, iteration)
        else:
            total = sum(-(-len(chunk) // 16) for chunk in chunks)
            found = track(self.rate(chunks, iteration), f"iteration {iteration}: scoring the pool", total)
        for rated in found:
            done.append(rated)
            if record:
                with naming(record), open(record, "a") as file:
                    file.write(json.dumps([iteration, *rated]) + "\n")
        return Scored(*(np.concatenate(values) for values in zip(*done)))

    def rate(self, chunks, iteration):
        """Yield a Scored of lists of each 16 images of the chunks, in order. chunks: a list of positions. Threads read
        images and compute scores while the network works on another chunk."""

        def read(positions):
            return positions, self.dataset.images(positions)

        def rate(part):
            positions, *found = part
            scores, lesion, agreement = found if self.one_gpu else self.scored(*found)
            dice = segmentation_metrics(self.dataset.masks(positions), lesion)["dice"]
            dice = np.where(self.dataset.has_mask[positions], dice, np.nan)
            return Scored(*(values.tolist() for values in (scores, dice, lesion.sum((1, 2)), agreement)))

        # On a GPU the maps stay there.
        reduce = gpu_score.scored(self.config.distance, self.fast_passes) if self.one_gpu else None
        pictures = map_in_order(read, chunks, workers=1)
        found = (
            (positions, *self.uncertainty(positions, iteration, images, reduce=reduce))
            for positions, images in pictures
        )
        parts = (part for whole in found for part in zip(*(in_chunks(values, 16) for values in whole)))
        yield from map_in_order(rate, parts)

    def scored(self, mean, uncertainty):
        """Of each image the score, float64 (n,), the predicted lesion, bool (n, H, W), and utils.expected_agreement."""
        scores = [ceal.uncertainty_score(u, m, self.config.distance) for u, m in zip(uncertainty, mean)]
        return np.array(scores), mean > 0.5, expected_agreement(mean)

    def save(self, path):
        """Write the weights and the settings that they need to `path`."""
        save_unet(self.model, path, self.mean, self.std)

    def finish(self, folder, test):
        """Write the weights and, if there are test images, test.csv. Returns what `evaluate` returns for them."""
        with ThreadPoolExecutor(1) as beside:
            saving = beside.submit(self.save, folder / "model.weights.h5")
            metrics = self.evaluate(test)
            saving.result()
        if metrics:
            write_test(self.dataset.ids[test], metrics, folder)
        return metrics

    def proposals(self, positions, iteration):
        """Yield the (mean, uncertainty map), float32 (H, W), of `uncertainty` for each of these positions."""
        for some in in_chunks(positions, self.chunk):
            yield from zip(*self.uncertainty(some, iteration))

    def predict(self, positions):
        """The network's probabilities with dropout off, float32 (n, H, W)."""
        if self.model.distribute_strategy.num_replicas_in_sync > 1:
            return self.model.predict(self.images(positions), verbose=0)[..., 0]
        batches = in_chunks(positions, 32)  # without the preparations of `predict`, which take 0.1 s
        return np.concatenate([self.model.predict_on_batch(self.images(some)) for some in batches])[..., 0]

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
