"""Cost-Effective Active Learning for melanoma segmentation: the whole loop (Gorriz et al., arXiv 1711.09168).

    python train.py --preset demo                                      # synthetic lesions, under 2 minutes
    python train.py --preset quick --data datasets/isic2017_96x128.h5  # real images, small: 20 minutes on 2 cores
    python train.py                                                    # the paper's experiment: a GPU workstation

A run writes runs/NAME/ and nothing else: config.json, environment.json, history.csv, and a folder per iteration.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import ceal
from data import SPLIT_SEED, Dataset, draw_row, normalisation, normalise, split, write_dataset
from unet import PRECISIONS, build_unet, dice_loss, keras, mc_dropout, print_devices, save_unet, share_out, tf
from utils import (
    UserError,
    derived_seed,
    figure_examples,
    figure_history,
    figure_scores,
    map_in_order,
    run_command,
    segmentation_metrics,
    track,
    whole_file,
    whole_folder,
    write_csv,
)

# --------------------------------------------------------------------------------------------------------- settings


def setting(default, help, minimum=None, choices=None):
    """A field of Config with its one-line comment, which is the option's help, and what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every setting of a run. The defaults are the paper's; PAPER means its text or its published code."""

    preset: str = setting("paper", "which settings to start from", choices=("paper", "quick", "demo"))
    data: str = setting("datasets/isic2017.h5", "the HDF5 file that data.py made; auto: draw one into the run's folder")
    run: str = setting("auto", "the folder to write; auto: runs/PRESET-DATE-TIME")
    precision: str = setting("float32", "what the network computes in, for training and scoring", choices=PRECISIONS)
    devices: str = setting("one", "all: share every batch out among all GPUs", choices=("one", "all"))
    seed: int = setting(1, "the run's seed: weights, batches, augmentation, dropout, random choices", 0)

    split_seed: int = setting(SPLIT_SEED, "the split's own seed; keep it, so that results compare", 0)
    initial: int = setting(600, "images labelled from the start", 1)
    pool: int = setting(1000, "unlabelled images that the oracle can be asked about", 1)
    test: int = setting(400, "test images: never scored, asked about or trained on", 1)

    filters: int = setting(32, "filters of the network's first level, doubled at each of four more", 1)
    dropout: float = setting(0.5, "share of the bottleneck dropped, in training and in Monte Carlo passes", 0)
    learning_rate: float = setting(1e-5, "Adam's learning rate", 0)
    batch_size: int = setting(32, "images in a training step", 1)
    initial_epochs: int = setting(10, "epochs of the initial training, with augmentation", 1)
    active_epochs: int = setting(2, "epochs of each iteration's training, without augmentation", 1)
    rotation: float = setting(40.0, "augmentation: rotation by up to so many degrees, either way", 0)
    width_shift: float = setting(0.2, "augmentation: shift by up to this share of the width, either way", 0)

    iterations: int = setting(9, "rounds of score, query, pseudo-label, train", 0)
    passes: int = setting(20, "T, Monte Carlo dropout predictions of an image", 1)
    distance: str = setting("inside", "the score's weight: ceal.distance_weight", choices=("inside", "both", "none"))
    no_detection: int = setting(10, "oracle queries with the lowest scores, per iteration", 0)
    most_uncertain: int = setting(10, "oracle queries with the highest scores, per iteration", 0)
    random: int = setting(15, "oracle queries at random, per iteration", 0)
    pseudo_start: int = setting(5, "the first iteration with pseudo-labels", 1)
    pseudo_first: int = setting(20, "pseudo-labels in that iteration", 0)
    pseudo_step: int = setting(20, "more pseudo-labels in each later iteration", 0)


PRESETS = {
    "paper": {},
    "quick": {
        "data": "datasets/isic2017_96x128.h5",
        "filters": 16,
        "learning_rate": 3e-4,
        "batch_size": 8,
        "passes": 10,
    },
    "demo": {
        "data": "auto",
        "filters": 8,
        "learning_rate": 3e-4,
        "batch_size": 4,
        "initial_epochs": 30,
        "initial": 60,
        "pool": 160,
        "test": 60,
        "passes": 10,
        "iterations": 4,
        "no_detection": 4,
        "most_uncertain": 4,
        "random": 6,
        "pseudo_start": 3,
        "pseudo_first": 10,
        "pseudo_step": 10,
    },
}
DEMO_SIZE = {"height": 64, "width": 80, "channels": 1}


def read_config(arguments=None):
    """The command line as a checked Config: the preset's settings, then those given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        special = [f"{name} {values[field.name]}" for name, values in PRESETS.items() if field.name in values]
        defaults = "; ".join([f"default {field.default}", *special])
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=field.type,
            choices=field.metadata["choices"],
            default=argparse.SUPPRESS,
            metavar=None if field.metadata["choices"] else field.type.__name__.upper(),
            help=f"{field.metadata['help']} ({defaults})",
        )
    given = vars(parser.parse_args(arguments))
    config = Config(**{**PRESETS[given.get("preset", "paper")], **given})
    check(config)
    if config.run == "auto":
        config.run = time.strftime(f"runs/{config.preset}-%Y%m%d-%H%M%S")
    return config


def check(config):
    """Raise UserError for settings that make no sense."""
    for field in dataclasses.fields(config):
        value, minimum = getattr(config, field.name), field.metadata["minimum"]
        if minimum is not None and not minimum <= value < float("inf"):
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be at least {minimum}, and finite")
    if not 0 < config.dropout < 1:
        raise UserError(f"--dropout {config.dropout}: must lie between 0 and 1; without it there is no uncertainty")
    if config.learning_rate == 0:
        raise UserError("--learning-rate 0: nothing would be learned")
    if config.width_shift > 1 or config.rotation > 180:
        raise UserError("--width-shift is a share of the width, at most 1, and --rotation at most 180 degrees")
    if config.iterations and not config.no_detection + config.most_uncertain + config.random:
        raise UserError("--no-detection, --most-uncertain and --random are all 0: the oracle would not be asked")


# --------------------------------------------------------------------------------------------------------- training


def augmentation(config, seed):
    """Keras layers that rotate, shift and mirror a batch (N, H, W, C) float32, each image in its own way."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.RandomRotation(config.rotation / 360, fill_mode="nearest", seed=derived_seed(seed, "rotation")),
            layers.RandomTranslation(0.0, config.width_shift, fill_mode="nearest", seed=derived_seed(seed, "shift")),
            layers.RandomFlip("horizontal", seed=derived_seed(seed, "flip")),
        ]
    )


def training_batches(read, count, batch_size, seed, augment=None):
    """A tf.data.Dataset of one epoch's batches of `count` examples, shuffled anew each time that it is gone through.

    read: example numbers, int64 (b,) -> images, float32 (b, H, W, C), normalised, and targets, float32 (b, H, W, 1)
    in [0, 1]; it is called while the step before is computed. With `augment` (a Keras layer) image and mask are moved
    together, the mask being one more channel of the image while they move.
    """
    shapes = [(None, *array.shape[1:]) for array in read(np.arange(1))]

    def batch(numbers):
        pictures, masks = map(tf.ensure_shape, tf.numpy_function(read, [numbers], (tf.float32, tf.float32)), shapes)
        if augment:
            moved = augment(tf.concat([pictures, masks], -1), training=True)
            pictures, masks = moved[..., :-1], tf.round(moved[..., -1:])
        return pictures, masks

    def in_batches(order):
        parts = tf.data.Dataset.range(steps)
        return parts.map(lambda step: order[step * count // steps : (step + 1) * count // steps])

    # The sizes of batches differ by one at most: no step on a few images, and a share for every device.
    steps = -(-count // batch_size)
    order = tf.data.Dataset.range(count).shuffle(count, seed=seed).batch(count)
    # The layers' random state makes the map sequential; its operations use all cores.
    batches = order.flat_map(in_batches).map(batch).prefetch(2)
    return batches.apply(tf.data.experimental.assert_cardinality(steps))


def training_step(model):
    """A compiled function (images, targets) that trains the model on this batch, of which each device has a share."""

    @tf.function(reduce_retracing=True, jit_compile=model.jit_compile)
    def step(images, targets):
        model.distribute_strategy.run(model.train_step, ((images, targets),))

    return step


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
            self.model = build_unet(*size, config.filters, config.dropout, config.precision)
            # XLA and several replicas do not go together.
            jit_compile = False if several else "auto"
            self.model.compile(keras.optimizers.Adam(config.learning_rate), dice_loss, jit_compile=jit_compile)
            self.model.optimizer.build(self.model.trainable_variables)
        self.step = training_step(self.model)
        self.chunk = 16 * strategy.num_replicas_in_sync  # images that are scored at a time

    def images(self, positions):
        """The network's input for these positions: float32 (n, H, W, C)."""
        return normalise(self.dataset.images(positions), self.mean, self.std)

    def batches(self, positions, labels, iteration):
        """An epoch's `training_batches` of these images with their labels, a list of (H, W) in [0, 1]; augmented if
        iteration is 0. Images are read from the data file batch by batch, so that memory does not limit their number.
        """

        def read(numbers):
            targets = np.stack([labels[n] for n in numbers], dtype=np.float32)[..., None]
            return self.images(positions[numbers]), targets

        seed = derived_seed(self.config.seed, iteration, "training")
        augment = augmentation(self.config, seed) if iteration == 0 else None
        return training_batches(read, len(positions), self.config.batch_size, seed, augment)

    def fit(self, positions, labels, iteration):
        """Train on these images with their labels: the initial training if iteration is 0."""
        epochs = self.config.active_epochs if iteration else self.config.initial_epochs
        batches = self.batches(positions, labels, iteration)
        steps = itertools.chain.from_iterable(itertools.repeat(batches, epochs))
        for batch in track(steps, f"iteration {iteration}: training steps", epochs * len(batches)):
            self.step(*share_out(self.model.distribute_strategy, *batch))

    def uncertainty(self, positions, iteration, images=None):
        """Mean and variance of the iteration's Monte Carlo passes: float32 (n, H, W) each. images: the data set's at
        these positions, where they have been read already."""
        images = self.dataset.images(positions) if images is None else images
        seed = derived_seed(self.config.seed, iteration, "passes")
        return mc_dropout(self.model, images, self.config.passes, seed, keys=positions, mean=self.mean, std=self.std)

    def score(self, pool, iteration):
        """Score and Dice of each unlabelled image of the ceal.Pool: float64 (n,) both, in the order of
        `pool.unlabelled`. The prediction that both rest on is the mean of the passes.

        A chunk's images are read before, and its maps rated after, while other chunks are in the network."""

        def read(positions):
            return positions, self.dataset.images(positions)

        def rate(maps):
            positions, mean, variance = maps
            scores = [ceal.uncertainty_score(v, m, self.config.distance) for v, m in zip(variance, mean)]
            return scores, segmentation_metrics(self.dataset.masks(positions), mean > 0.5)["dice"]

        chunks = in_chunks(pool.unlabelled, self.chunk)
        pictures = map_in_order(read, chunks, workers=1)
        maps = ((positions, *self.uncertainty(positions, iteration, images)) for positions, images in pictures)
        rated = track(map_in_order(rate, maps), f"iteration {iteration}: scoring the pool", len(chunks))
        scores, dice = (np.concatenate(values) for values in zip(*rated))
        return scores, dice

    def evaluate(self, positions):
        """Mean over these images of each metric at a threshold of 0.5, a dict; warns of a collapsed network."""
        metrics, lesion = [], []
        for some in in_chunks(positions, 64):
            prediction = self.model.predict(self.images(some), verbose=0)[..., 0] > 0.5
            metrics.append(segmentation_metrics(self.dataset.masks(some), prediction))
            lesion.append(prediction.mean())
        if max(lesion) == 0 or min(lesion) == 1:
            print(f"warning: the network calls every pixel {'skin' if max(lesion) == 0 else 'lesion'}: it collapsed")
        return {name: float(np.concatenate([m[name] for m in metrics]).mean()) for name in metrics[0]}


def in_chunks(positions, size):
    """Cut positions into pieces of at most `size`, so that memory does not grow with their number."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


# --------------------------------------------------------------------------------------------------------- the loop


METRICS = ["dice", "jaccard", "sensitivity", "specificity", "accuracy", "threshold_jaccard"]
HISTORY = ["iteration", "annotations", "pseudo_labels", *METRICS, "seconds_scoring", "seconds_training"]


def run_loop(config, dataset, parts, run):
    """The initial training, then score -> query -> pseudo-label -> train -> evaluate, each iteration in its folder.

    Returns the rows of history.csv, a list of dict."""
    mean, std = normalisation(dataset, np.concatenate([parts.initial, parts.pool]))
    trainer = Trainer(config, dataset, mean, std)
    oracle = ceal.SimulatedOracle(dataset.masks)
    pool = ceal.Pool(parts.initial, oracle.annotate(parts.initial), parts.pool, parts.test)
    history = []
    for iteration in range(config.iterations + 1):
        if not len(pool.unlabelled):
            print(f"the pool is empty: the run ends before iteration {iteration}")
            break
        with whole_folder(run / f"iteration_{iteration:02d}") as folder:
            pseudo, pseudo_labels, seconds_scoring = [], [], 0.0
            if iteration:
                pseudo, pseudo_labels, seconds_scoring = query(trainer, pool, oracle, iteration, folder)
            started = time.monotonic()
            trainer.fit(*pool.training_set(pseudo, pseudo_labels), iteration)
            seconds_training = time.monotonic() - started
            save_unet(trainer.model, folder / "model.weights.h5", mean, std)
            metrics = trainer.evaluate(pool.test)
        counts = iteration, pool.annotations, len(pseudo)
        seconds = f"{seconds_scoring:.1f}", f"{seconds_training:.1f}"
        history.append(dict(zip(HISTORY, [*counts, *(f"{metrics[m]:.6f}" for m in METRICS), *seconds])))
        write_csv(run / "history.csv", HISTORY, [row.values() for row in history])
        figure_history(history, run / "dice.png")
        print_iteration(history[-1])
    return history


def query(trainer, pool, oracle, iteration, folder):
    """Score the pool, ask the oracle, and let the network label what it is sure of.

    Writes scores.csv, queries.csv and the figures. Returns the positions with pseudo-labels, these labels, float32
    (n, H, W), and the seconds that scoring took.
    """
    config, dataset, started = trainer.config, trainer.dataset, time.monotonic()
    candidates = pool.unlabelled
    scores, dice = trainer.score(pool, iteration)
    seconds = time.monotonic() - started

    rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
    groups = ceal.select_queries(scores, rng, config.no_detection, config.most_uncertain, config.random)
    queried = candidates[np.concatenate(list(groups.values()))]
    count = ceal.pseudo_label_count(iteration, config.pseudo_start, config.pseudo_first, config.pseudo_step)
    groups["pseudo"] = ceal.select_pseudo_labels(scores, rng, count, exclude=np.concatenate(list(groups.values())))
    pseudo = candidates[groups["pseudo"]]
    pseudo_labels, _ = trainer.uncertainty(pseudo, iteration)

    ids = dataset.ids[candidates]
    write_csv(folder / "scores.csv", ["id", "uncertainty", "dice"], zip(ids, scores, dice))
    rows = [(ids[at], group) for group, chosen in groups.items() for at in chosen]
    write_csv(folder / "queries.csv", ["id", "group"], rows)
    figure_scores(scores, dice, groups, folder / "scores.png")
    draw_examples(trainer, candidates, scores, dice, groups, iteration, folder / "examples.png")

    pool.annotate(queried, oracle.annotate(queried))
    return pseudo, pseudo_labels, seconds


def draw_examples(trainer, candidates, scores, dice, groups, iteration, path, each=2):
    """The paper's Fig. 1 for `each` images of every group: image, truth, prediction, uncertainty map."""
    examples = []
    for group, chosen in groups.items():
        at = chosen[:each]
        mean, variance = trainer.uncertainty(candidates[at], iteration)
        images, truths = (read(candidates[at]) for read in (trainer.dataset.images, trainer.dataset.masks))
        titles = [f"{trainer.dataset.ids[candidates[n]]}\nscore {scores[n]:.3g}, Dice {dice[n]:.2f}" for n in at]
        examples.append((group, list(zip(titles, images, truths, mean, variance))))
    figure_examples(examples, path)


# ------------------------------------------------------------------------------------------------- what a user sees


def open_dataset(config):
    """The run's Dataset, drawn into the run's folder if `config.data` is auto."""
    path = Path(config.data)
    if config.data == "auto":
        path = Path(config.run, "synthetic.h5")
        config.data = str(path)
        size, count = DEMO_SIZE.values(), config.initial + config.pool + config.test
        rows = (draw_row(index, config.split_seed, *size) for index in range(count))
        write_dataset(path, rows, count, *size, "synthetic lesions")
    elif not path.exists():
        size = " --height 96 --width 128" if config.preset == "quick" else ""
        raise UserError(
            f"{path} is not there: download the training data and the Part 1 ground truth of ISIC 2017 from "
            f"challenge.isic-archive.com/data/#2017, unpack them, and run `python data.py isic FOLDER {path}{size}`. "
            "To see the program run without a download: python train.py --preset demo"
        )
    return Dataset(path)


def print_plan(config, dataset, parts):
    """What the run will do, before it does it."""
    size = f"{dataset.height}x{dataset.width}, {dataset.channels} channel(s)"
    print(f"data      {dataset.path}: {dataset.source}, {size}")
    print(f"split     {len(parts.initial)} labelled, {len(parts.pool)} in the pool, {len(parts.test)} for test")
    steps = -(-len(parts.initial) // config.batch_size)
    print(f"training  {config.initial_epochs} epochs of {steps} steps at a learning rate of {config.learning_rate:g}")
    asked = config.no_detection + config.most_uncertain + config.random
    print(
        f"CEAL      {config.iterations} iterations: score the pool in {config.passes} passes, ask for {asked} masks, "
        f"train {config.active_epochs} epochs; pseudo-labels from iteration {config.pseudo_start}"
    )
    print(f"run       {config.run}", flush=True)


def print_iteration(row):
    """One line a person can follow."""
    print(
        f"iteration {row['iteration']}: {row['annotations']} annotations, {row['pseudo_labels']:>3} pseudo-labels, "
        f"Dice {float(row['dice']):.3f}, Jaccard {float(row['jaccard']):.3f}  "
        f"({float(row['seconds_scoring']):.0f} s scoring, {float(row['seconds_training']):.0f} s training)",
        flush=True,
    )


PACKAGES = ["tensorflow", "keras", "numpy", "scipy", "scikit-image", "pillow", "h5py", "matplotlib"]


def environment():
    """What the run ran on: versions, git commit, devices, command line."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    return {
        "command": sys.argv,
        "git_commit": commit,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": [device.name for device in tf.config.list_physical_devices()],
    }


def main():
    """The command line."""
    config = read_config()
    run = Path(config.run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} exists already: give another --run, or move it away")
    print_devices()
    with open_dataset(config) as dataset:
        parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
        print_plan(config, dataset, parts)
        for name, content in ("config", dataclasses.asdict(config)), ("environment", environment()):
            with whole_file(run / f"{name}.json") as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")
        history = run_loop(config, dataset, parts, run)
    last = run / f"iteration_{history[-1]['iteration']:02d}"
    print(f"done: {run}/history.csv and {run}/dice.png hold the result, {last}/ the choices and their figures")
    print(f"masks for your own images: python predict.py IMAGES --weights {last}/model.weights.h5 --out masks")


if __name__ == "__main__":
    run_command(main)
