"""Cost-Effective Active Learning for melanoma segmentation: the whole loop (Gorriz et al., arXiv 1711.09168).

    python train.py --preset demo                                      # synthetic lesions, under 2 minutes
    python train.py --preset quick --data datasets/isic2017_96x128.h5  # real images, small: 40 minutes on a core
    python train.py                                                    # the paper's experiment: a GPU workstation

A run writes runs/NAME/ and nothing else: config.json, environment.json, history.csv, and a folder per iteration.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import ceal
from data import NEAR_DUPLICATES, SPLIT_SEED, Dataset, draw_row, normalisation, normalise, split, write_dataset
from unet import (
    INITIALIZERS,
    LOSSES,
    MEASURES,
    PRECISIONS,
    SCHEDULES,
    Checkpoint,
    augmentation,
    build_unet,
    count_parameters,
    keras,
    learning_rate,
    load_unet,
    load_weights,
    mc_dropout,
    print_devices,
    restart,
    save_unet,
    share_out,
    tf,
    training_batches,
    training_step,
)
from utils import (
    GROUPS,
    UserError,
    cores,
    derived_seed,
    figure_examples,
    figure_history,
    figure_scores,
    in_one_line,
    locked,
    map_in_order,
    naming,
    read_csv,
    run_command,
    segmentation_metrics,
    stopped_at_once,
    track,
    whole_file,
    whole_folder,
    write_csv,
)

# --------------------------------------------------------------------------------------------------------- settings


def setting(default, help, minimum=None, choices=None):
    """A field of Config with its one-line comment, which is the option's help, and what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "choices": choices})


# The training that was found on labelled images: README, "Presets".
TRAINED = {
    "initializer": "HeNormal",
    "loss": "dice_bce",
    "learning_rate": 1e-3,
    "active_learning_rate": 3e-4,
    "schedule": "cosine",
    "batch_size": 4,
    "initial_steps": 1200,
    "active_steps": 300,
    "augment": "all",
    "rotation": 20.0,
    "width_shift": 0.1,
}
PRESETS = {
    "paper": {},
    "tuned": {
        **TRAINED,
        "learning_rate": 4e-4,
        "active_learning_rate": 1e-4,
        "initial_steps": 3000,
        "active_steps": 400,
    },
    "quick": {**TRAINED, "data": "datasets/isic2017_96x128.h5", "filters": 16, "passes": 10},
    "best": {
        **TRAINED,
        "data": "datasets/isic2017_rgb_96x128.h5",
        "learning_rate": 5e-4,
        "initial": 1600,
        "pool": 0,
        "iterations": 0,
        "batch_size": 8,
        "initial_steps": 6500,
        "augmentation": "strong",
        "rotation": 30.0,
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


@dataclasses.dataclass
class Config:
    """Every setting of a run. The defaults are the paper's; PAPER means its text or its published code."""

    preset: str = setting("paper", "which settings to start from", choices=tuple(PRESETS))
    data: str = setting("datasets/isic2017.h5", "the HDF5 file that data.py made; auto: draw one into the run's folder")
    run: str = setting("auto", "the folder to write; auto: runs/PRESET-DATE-TIME")
    precision: str = setting("float32", "what the network computes in, for training and scoring", choices=PRECISIONS)
    deterministic: str = setting(
        "auto", "the same bits in every run, which a GPU is slower at; auto: on a CPU", choices=("auto", "yes", "no")
    )
    devices: str = setting("one", "all: share every batch out among all GPUs", choices=("one", "all"))
    seed: int = setting(1, "the run's seed: weights, batches, augmentation, dropout, random choices", 0)

    split_seed: int = setting(SPLIT_SEED, "the split's own seed; keep it, so that results compare", 0)
    initial: int = setting(600, "images labelled from the start", 1)
    pool: int = setting(1000, "unlabelled images that the oracle can be asked about", 0)
    test: int = setting(400, "test images: never scored, asked about or trained on; 0: nothing is measured", 0)
    validation: int = setting(
        0, "measure on so many of the labelled images, held out, in place of the test images: to choose settings by", 0
    )
    oracle: str = setting(
        "simulated", "who is asked: the masks in the data file, or a person", choices=("simulated", "folder")
    )

    filters: int = setting(32, "filters of the network's first level, doubled at each of four more", 1)
    dropout: float = setting(0.5, "share of the bottleneck dropped, in training and in Monte Carlo passes", 0)
    initializer: str = setting("GlorotUniform", "how the weights are drawn at first", choices=INITIALIZERS)
    learning_rate: float = setting(1e-5, "Adam's learning rate, the highest of a training", 0)
    active_learning_rate: float = setting(0.0, "that of each iteration's training; 0: as --learning-rate", 0)
    loss: str = setting("dice", "minus the Dice coefficient, or that plus the cross-entropy", choices=tuple(LOSSES))
    schedule: str = setting("constant", "the learning rate within each training: unet.learning_rate", choices=SCHEDULES)
    batch_size: int = setting(32, "images in a training step", 1)
    initial_epochs: int = setting(10, "epochs of the initial training, with augmentation", 1)
    active_epochs: int = setting(2, "epochs of each iteration's training", 1)
    initial_steps: int = setting(0, "steps of the initial training; 0: as many as --initial-epochs makes", 0)
    active_steps: int = setting(0, "steps of each iteration's training; 0: as many as --active-epochs makes", 0)
    augment: str = setting("initial", "augment the initial training alone, or all", choices=("initial", "all"))
    augmentation: str = setting(
        "paper", "rotate, shift, mirror, or more: unet.augmentation", choices=("paper", "strong")
    )
    rotation: float = setting(40.0, "augmentation: rotation by up to so many degrees, either way", 0)
    width_shift: float = setting(0.2, "augmentation: shift by up to this share of the width, either way", 0)

    iterations: int = setting(9, "rounds of score, query, pseudo-label, train", 0)
    passes: int = setting(20, "T, Monte Carlo dropout predictions of an image", 1)
    uncertainty: str = setting("variance", "what the map of a pixel's passes holds: unet.mc_dropout", choices=MEASURES)
    distance: str = setting("inside", "the score's weight: ceal.distance_weight", choices=("inside", "both", "none"))
    query: str = setting(
        "paper",
        "the three groups; as many at random of the pool, each image as likely or in proportion to its score; or none",
        choices=("paper", "uniform", "power", "none"),
    )
    no_detection: int = setting(10, "oracle queries with the lowest scores, per iteration", 0)
    no_detection_rule: str = setting(
        "lowest",
        "empty: of those only images on which nothing is detected, more at random instead of the others",
        choices=("lowest", "empty"),
    )
    most_uncertain: int = setting(10, "oracle queries from the last bins of the scores' histogram, per iteration", 0)
    random: int = setting(15, "oracle queries at random, per iteration", 0)
    pseudo_start: int = setting(5, "the first iteration with pseudo-labels", 1)
    pseudo_first: int = setting(20, "pseudo-labels in that iteration", 0)
    pseudo_step: int = setting(20, "more pseudo-labels in each later iteration", 0)

    @property
    def asked(self):
        """Oracle queries in an iteration."""
        return 0 if self.query == "none" else self.no_detection + self.most_uncertain + self.random

    def epoch_steps(self, images):
        """Training steps in an epoch of so many images."""
        return -(-images // self.batch_size)

    def training_steps(self, images, iteration):
        """Steps of this iteration's training on so many images, of the initial training if iteration is 0."""
        steps, epochs = self.initial_steps, self.initial_epochs
        if iteration:
            steps, epochs = self.active_steps, self.active_epochs
        return steps or epochs * self.epoch_steps(images)

    def highest_rate(self, iteration):
        """The highest learning rate of this iteration's training, of the initial training if iteration is 0."""
        return (iteration and self.active_learning_rate) or self.learning_rate


UNSCORED = "uniform", "none"  # the choices of --query that need no scores
DEMO_SIZE = {"height": 64, "width": 80, "channels": 1}
# Of one start of a run, and no settings of it.
SWITCHES = {"wait": "watch the folder until all is answered", "partial": "go on with what is answered"}


def argument_parser():
    """The command line: an option for each field of Config, and what is no setting of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    parser.add_argument("--force", action="store_true", help="start anew; an earlier run of this name is moved aside")
    for name, help in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"--oracle folder: {help}")
    return parser


def read_command_line(arguments=None):
    """The command line as a checked Config, and which of SWITCHES are given, a dict of bool. The settings are those of
    a run that is there already; else the preset's, then those given. With --force the folder of an earlier run is moved
    aside."""
    given = vars(argument_parser().parse_args(arguments))
    switches = {name: given.pop(name) for name in SWITCHES}
    force, run = given.pop("force"), Path(given.get("run", "auto"))
    if (run / "config.json").exists() and not force:
        config = stored_config(run, given)
    else:
        config = Config(**{**PRESETS[given.get("preset", "paper")], **given})
        check(config)
    if config.run == "auto":
        config.run = time.strftime(f"runs/{config.preset}-%Y%m%d-%H%M%S")
    if config.oracle == "simulated" and any(switches.values()):
        raise UserError("--wait and --partial are for a person's answers: give --oracle folder, or leave them out")
    if all(switches.values()):
        raise UserError("--wait is for all answers and --partial for some: give one of them")
    if force and ((run / "config.json").exists() or (run.is_dir() and only_ours(run))):
        if Path.cwd().is_relative_to(run.resolve()):
            raise UserError(f"--force: {run} is to be moved, and holds the folder that you are in: leave it first")
        aside = run.with_name(f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        with locked(run):
            run.rename(aside)
        print(f"{run} is now {aside}")
    return config, switches


def read_config(arguments=None):
    """The Config of `read_command_line` alone."""
    return read_command_line(arguments)[0]


def stored_config(run, given):
    """The Config of an earlier start of this run. Raises UserError if a setting given now differs."""
    path = run / "config.json"
    try:
        config = Config(**json.loads(path.read_text()))
        check(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: no settings of this version of train.py ({error}); give another --run")
    config.run = str(run)
    for name, value in given.items():
        stored = getattr(config, name)
        if name != "run" and value != stored:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {value}: {run} was begun with {stored}; leave it out to go on, or give another --run"
            )
    return config


def check(config):
    """Raise UserError for settings that make no sense."""
    for field in dataclasses.fields(config):
        value, minimum, choices = (getattr(config, field.name), *map(field.metadata.get, ("minimum", "choices")))
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or (choices and value not in choices):
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be {choices or field.type.__name__}")
        if minimum is not None and not minimum <= value < 2**31:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be at least {minimum}, and below 2**31")
    if not 0 < config.dropout < 1:
        raise UserError(f"--dropout {config.dropout}: must lie between 0 and 1; without it there is no uncertainty")
    if config.no_detection_rule == "empty" and config.distance != "inside":
        raise UserError(
            f"--no-detection-rule empty goes with --distance inside: under {config.distance} an empty prediction does "
            "not score 0"
        )
    if config.learning_rate == 0:
        raise UserError("--learning-rate 0: nothing would be learned")
    if config.width_shift > 1:
        raise UserError(f"--width-shift {config.width_shift}: is a share of the width, at most 1")
    if config.rotation > 180:
        raise UserError(f"--rotation {config.rotation}: must be at most 180 degrees")
    if config.query == "none" and config.oracle == "folder":
        raise UserError("--query none: nobody is asked; leave out --oracle folder")
    if config.iterations and not config.asked and config.query != "none":
        raise UserError("--no-detection, --most-uncertain and --random are all 0: the oracle would not be asked")
    if config.iterations and config.asked > config.pool:
        raise UserError(
            f"--pool {config.pool}: fewer images than --no-detection, --most-uncertain and --random ask for"
        )
    if config.validation >= config.initial:
        raise UserError(f"--validation {config.validation}: must leave some of the --initial {config.initial} images")
    needed = 16 * count_parameters(1, config.filters)  # a weight, its gradient and Adam's two moments, 4 bytes each
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--filters {config.filters}: training such a network takes {needed / 1e9:,.0f} GB of memory, and there "
            f"are {memory / 1e9:,.0f} GB; use fewer"
        )


# --------------------------------------------------------------------------------------------------------- training


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

    def proposals(self, positions, iteration):
        """Yield the (mean, uncertainty map), float32 (H, W), of `uncertainty` for each of these positions."""
        for some in in_chunks(positions, self.chunk):
            yield from zip(*self.uncertainty(some, iteration))

    def predict(self, positions):
        """The network's probabilities with dropout off, float32 (n, H, W)."""
        return self.model.predict(self.images(positions), verbose=0)[..., 0]

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
        warn_if_collapsed(lesion)
        return {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}


def read_record(record, iteration):
    """The (scores, Dice) of each chunk of this iteration in a file of `Trainer.score`, up to where it breaks off; the
    file is cut there, and emptied if it is of another iteration."""
    chunks, end = [], 0
    if record is None or not record.exists():
        return chunks
    with open(record, "r+b") as file:
        for line in file:
            try:
                found, *rated = json.loads(line)
            except (ValueError, TypeError):
                break
            if found != iteration or not line.endswith(b"\n"):
                break
            chunks.append(rated)
            end += len(line)
        file.truncate(end)
    return chunks


def in_chunks(positions, size):
    """Cut positions into pieces of at most `size`, so that memory does not grow with their number."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


# --------------------------------------------------------------------------------------------------------- the loop


METRICS = ["dice", "jaccard", "sensitivity", "specificity", "accuracy", "threshold_jaccard"]
HISTORY = ["iteration", "annotations", "pseudo_labels", *METRICS, "seconds_scoring", "seconds_training"]


INITIAL = "initial"  # the group of the images that are asked for before the first training


def run_loop(config, dataset, parts, run, oracle):
    """The initial training, then score -> query -> pseudo-label -> train -> evaluate, each iteration in its folder.

    Iterations whose folders are there already are taken from them. Returns the rows of history.csv, a list of dict.
    Raises ceal.Unanswered if the run has to wait for the oracle."""
    mean, std = normalisation(dataset, np.concatenate([parts.initial, parts.pool]))
    trainer = Trainer(config, dataset, mean, std)
    has_mask = dataset.has_mask[parts.initial]
    labelled, to_ask = parts.initial[has_mask], parts.initial[~has_mask]
    pool = ceal.Pool(labelled, dataset.masks(labelled), np.concatenate([parts.pool, to_ask]), parts.test)
    oracle.collect()
    history = finished_iterations(run, dataset, pool, oracle)
    if history:
        last = run / f"iteration_{len(history) - 1:02d}" / "model.weights.h5"
        trainer.load(last)
        print(f"{len(history)} iterations are done already, up to {last.parent}", flush=True)
        write_history(history, run)
    forget_choices(config, run, len(history))
    for iteration in range(len(history), config.iterations + 1):
        if iteration and config.asked and not len(pool.unlabelled):
            print(f"the pool is empty: the run ends before iteration {iteration}")
            break
        choice = run / f".queries_{iteration:02d}"
        if not choice.exists():
            decide(trainer, pool, oracle, to_ask, iteration, choice)
        pseudo = ask(trainer, pool, oracle, iteration, choice)
        with whole_folder(run / f"iteration_{iteration:02d}") as folder:
            history.append(run_iteration(trainer, pool, pseudo, iteration, choice, folder))
        for leftover in trainer.leftovers:
            leftover.unlink(missing_ok=True)
        forget_choices(config, run, len(history))
        write_history(history, run)
        print_iteration(history[-1])
    return history


def decide(trainer, pool, oracle, to_ask, iteration, choice):
    """Choose whom to ask about: the images `to_ask` before the first training, later as `query` does. What is chosen is
    in the folder `choice` then, whole, so that it is never drawn twice."""
    with whole_folder(choice) as folder:
        if iteration:
            query(trainer, pool, oracle, iteration, folder)
        elif len(to_ask):
            write_queries(trainer.dataset.ids, {INITIAL: to_ask}, folder)


def ask(trainer, pool, oracle, iteration, choice):
    """Put what the oracle answers into the ceal.Pool; returns the positions to pseudo-label."""
    try:
        groups = read_queries(choice, iteration, trainer.dataset)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{choice}: not as train.py wrote it ({error}); remove it to choose anew")
    asked = {group: positions for group, positions in groups.items() if group != "pseudo"}
    oracle.ask(iteration, asked, (lambda positions: trainer.proposals(positions, iteration)) if iteration else None)
    pseudo = annotate(pool, oracle, iteration, groups)
    if not pool.annotations:
        raise UserError(
            f"{choice.parent}: every image of --initial was rejected, and nothing can be trained; begin another run, "
            "with more of them or another --split-seed"
        )
    return pseudo


def annotate(pool, oracle, iteration, groups):
    """Put the oracle's answers of an iteration into the ceal.Pool. groups: those of `read_queries`. Returns the
    positions to pseudo-label, without any that have got a late answer."""
    asked = [position for group, positions in groups.items() if group != "pseudo" for position in positions]
    answers = oracle.answers(iteration, np.array(asked, int))
    pool.annotate(answers.positions, answers.masks)
    pool.reject(answers.rejected)
    pseudo = np.array(groups.get("pseudo", []), int)
    return pseudo[np.isin(pseudo, pool.unlabelled)]


def write_queries(ids, groups, folder):
    """queries.csv. groups: a dict of group to positions in `ids`."""
    rows = [(ids[position], group) for group, positions in groups.items() for position in positions]
    write_csv(folder / "queries.csv", ["id", "group"], rows)


def read_queries(folder, iteration, dataset):
    """What `write_queries` wrote: a dict of group to positions in the data set. Before the first training there may be
    no such file. Raises KeyError, ValueError or OSError if it is damaged."""
    positions, groups = {id: position for position, id in enumerate(dataset.ids)}, {}
    if iteration == 0 and not (folder / "queries.csv").exists():
        return groups
    for row in read_csv(folder / "queries.csv"):
        if row["group"] not in (INITIAL, *GROUPS):
            raise ValueError(f"{row['group']} is no group of queries.csv")
        groups.setdefault(row["group"], []).append(positions[row["id"]])
    return groups


def forget_choices(config, run, finished):
    """Remove all choices but that of the iteration after so many finished ones, whose folders hold theirs too; a later
    one is left of iterations that are done anew. Those that a person was asked about stay: an answer may come late."""
    for choice in run.glob(".queries_*") if config.oracle == "simulated" else ():
        if choice.name != f".queries_{finished:02d}":
            shutil.rmtree(choice, ignore_errors=True)


def warn_if_collapsed(lesion):
    """lesion: which pixels of some images the network calls lesion, or which share of them, an array or a list."""
    if np.max(lesion) == 0 or np.min(lesion) == 1:
        print(f"warning: the network calls every pixel {'skin' if np.max(lesion) == 0 else 'lesion'}: it collapsed")


def run_iteration(trainer, pool, pseudo, iteration, choice, folder):
    """Pseudo-label these positions, train, and evaluate, written to `folder` with what was chosen; returns the row of
    history.csv, a dict."""
    for path in choice.glob("[!.]*"):
        shutil.copy(path, folder)
    seconds_scoring = (choice / ".seconds").read_text() if iteration else "0.0"
    # Without images, predict fails.
    pseudo_labels = list(trainer.predict(pseudo)) if len(pseudo) else []
    started = time.monotonic()
    trainer.fit(*pool.training_set(pseudo, pseudo_labels), iteration)
    seconds_training = time.monotonic() - started
    save_unet(trainer.model, folder / "model.weights.h5", trainer.mean, trainer.std)
    metrics = trainer.evaluate(pool.test)
    if metrics:
        columns = zip(*(metrics[m].round(6) for m in METRICS))
        rows = ((id, *values) for id, values in zip(trainer.dataset.ids[pool.test], columns))
        write_csv(folder / "test.csv", ["id", *METRICS], rows)
    else:  # nothing but this shows a collapse
        warn_if_collapsed(trainer.predict(pool.training_set()[0][:64]) > 0.5)
    means = [f"{metrics[m].mean():.6f}" if metrics else "" for m in METRICS]
    counts = iteration, pool.annotations, len(pseudo)
    row = dict(zip(HISTORY, [*counts, *means, seconds_scoring, f"{seconds_training:.1f}"]))
    write_csv(folder / "history.csv", HISTORY, [row.values()])
    return row


def write_history(history, run):
    """history.csv and, if there are test images, its figure."""
    write_csv(run / "history.csv", HISTORY, [row.values() for row in history])
    if history[-1]["dice"]:
        figure_history(history, run / "dice.png")


def finished_iterations(run, dataset, pool, oracle):
    """The rows of history.csv of the iterations whose folders are there; their annotations go to the ceal.Pool.

    Raises UserError if a folder does not hold what it should."""
    history = []
    while (folder := run / f"iteration_{len(history):02d}").is_dir():
        try:
            (row,) = read_csv(folder / "history.csv")
            pseudo = annotate(pool, oracle, len(history), read_queries(folder, len(history), dataset))
            expected = len(history), pool.annotations, len(pseudo)
            if tuple(int(row[name]) for name in HISTORY[:3]) != expected:
                raise ValueError("queries are missing")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder}: not as train.py wrote it ({error}); move it and all later ones away to do them anew"
            )
        history.append(row)
    numbers = (path.name.partition("_")[2] for path in run.glob("iteration_*"))
    if any(number.isdecimal() and int(number) >= len(history) for number in numbers):
        raise UserError(f"{folder} is missing, and later ones are there: put it back, or move all later ones away too")
    return history


def query(trainer, pool, oracle, iteration, folder):
    """Score the pool; choose whom to ask the oracle about, but for what it has answered already, and what to let the
    network label.

    Writes queries.csv, the seconds that scoring took and, where the choice rests on scores, scores.csv and the figures.
    """
    config, candidates, started = trainer.config, pool.unlabelled, time.monotonic()
    count = ceal.pseudo_label_count(iteration, config.pseudo_start, config.pseudo_first, config.pseudo_step)
    scored = (config.query not in UNSCORED or count > 0) and len(candidates) > 0
    scores, dice = trainer.score(pool, iteration, trainer.record) if scored else (np.zeros(len(candidates)), None)
    (folder / ".seconds").write_text(f"{time.monotonic() - started if scored else 0:.1f}")

    early = oracle.answers(iteration, np.array([], int))
    free = np.flatnonzero(~np.isin(candidates, [*early.positions, *early.rejected]))
    groups = {group: free[chosen] for group, chosen in choose(config, scores[free], iteration, count).items()}
    ids = trainer.dataset.ids[candidates]
    write_queries(ids, groups, folder)
    if scored:
        rows = zip(ids, scores, ("" if np.isnan(value) else value for value in dice))
        write_csv(folder / "scores.csv", ["id", "uncertainty", "dice"], rows)
        figure_scores(scores, dice, groups, *ceal.histogram(scores)[2:], folder / "scores.png")
        draw_examples(trainer, candidates, scores, dice, groups, iteration, folder / "examples.png")


def choose(config, scores, iteration, pseudo_labels):
    """Whom to ask about, and then whom to pseudo-label: a dict of group to positions in `scores`, `pseudo` last."""
    rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
    if config.query in UNSCORED:
        groups = {"random": ceal.select_uniform(len(scores), rng, config.asked)}
    elif config.query == "power":
        groups = {"random": ceal.select_power(scores, rng, config.asked)}
    else:
        asked = config.no_detection, config.most_uncertain, config.random
        groups = ceal.select_queries(scores, rng, *asked, config.no_detection_rule)
    queried = np.concatenate(list(groups.values()))
    return {**groups, "pseudo": ceal.select_pseudo_labels(scores, rng, pseudo_labels, exclude=queried)}


def draw_examples(trainer, candidates, scores, dice, groups, iteration, path, each=2, steps=3):
    """The paper's Fig. 1 for `each` images of every group: image, truth, the first step predictions (single passes),
    the mean of all and the uncertainty map."""
    examples = []
    for group, chosen in groups.items():
        if not len(at := chosen[:each]):
            continue
        mean, variance = trainer.uncertainty(candidates[at], iteration)
        # The sums of the first 0, 1, 2, ... passes: what one adds to the other is a pass.
        sums = [0.0, *(n * trainer.uncertainty(candidates[at], iteration, passes=n)[0] for n in range(1, steps + 1))]
        images, masks = (read(candidates[at]) for read in (trainer.dataset.images, trainer.dataset.masks))
        rated = ["no truth" if np.isnan(dice[n]) else f"Dice {dice[n]:.2f}" for n in at]
        ids = trainer.dataset.ids[candidates[at]]
        titles = [f"{id}\nscore {scores[n]:.3g}, {words}" for id, n, words in zip(ids, at, rated)]
        truths = [None if np.isnan(dice[n]) else mask for n, mask in zip(at, masks)]
        passes = zip(*(after - before for before, after in itertools.pairwise(sums)))
        examples.append((group, list(zip(titles, images, truths, passes, mean, variance))))
    if examples:
        figure_examples(examples, path)


# ------------------------------------------------------------------------------------------------- what a user sees


def open_dataset(config):
    """The run's Dataset, drawn into the run's folder if `config.data` is auto."""
    path = Path(config.data)
    if config.data == "auto":
        path = Path(config.run, "synthetic.h5")
        size, count = DEMO_SIZE.values(), config.initial + config.pool + config.test
        rows = (draw_row(index, config.split_seed, *size) for index in range(count))
        if not path.exists():
            write_dataset(path, rows, count, *size, "synthetic lesions")
    elif not path.exists():
        small = " --height 96 --width 128"
        size = {"quick": small, "best": f"{small} --channels 3"}.get(config.preset, "")
        raise UserError(
            f"{path} is not there: download the training data and the Part 1 ground truth of ISIC 2017 from "
            f"challenge.isic-archive.com/data/#2017, unpack them, and run `python data.py isic FOLDER {path}{size}`. "
            "To see the program run without a download: python train.py --preset demo"
        )
    return Dataset(path)


def hold_out(parts, dataset, validation, seed):
    """The data.Split with so many of the labelled images, drawn by the seed, in place of the test images; none that has
    a near-duplicate, which may be trained on."""
    if not validation:
        return parts
    alone = ~np.isin(dataset.ids, np.ravel(NEAR_DUPLICATES))
    with_mask = parts.initial[(dataset.has_mask & alone)[parts.initial]]
    if len(with_mask) < validation:
        raise UserError(f"--validation {validation}: only {len(with_mask)} of the --initial images have masks")
    held_out = np.random.default_rng(derived_seed(seed, "validation")).permutation(with_mask)[:validation]
    return parts._replace(initial=np.setdiff1d(parts.initial, held_out), test=np.sort(held_out))


def print_plan(config, dataset, parts):
    """What the run will do, before it does it."""
    size = f"{dataset.height}x{dataset.width}, {dataset.channels} channel(s)"
    print(f"data      {dataset.path}: {dataset.source}, {size}")
    tested = "held out of the labelled ones" if config.validation else "for test"
    print(f"split     {len(parts.initial)} at first, {len(parts.pool)} in the pool, {len(parts.test)} {tested}")
    steps = config.training_steps(len(parts.initial), 0)
    rate = f"a learning rate of {config.learning_rate:g}, {config.schedule}"
    print(f"training  {steps} steps of up to {config.batch_size} images at {rate}")
    if config.iterations:
        print(f"CEAL      {config.iterations} iterations: {plan_of_iteration(config)}")
    print(f"run       {config.run}", flush=True)
    if not len(parts.test):
        print("there are no test images: the result is not measured, the metrics in history.csv stay empty", flush=True)


def plan_of_iteration(config):
    """What an iteration does, in words."""
    lengths = f"{config.active_steps} steps" if config.active_steps else f"{config.active_epochs} epochs"
    how = {"uniform": " at random", "power": " in proportion to the score"}.get(config.query, "")
    scored = f"score the pool in {config.passes} passes, " if config.query not in UNSCORED else ""
    pseudo = "no pseudo-labels"
    if config.pseudo_first or config.pseudo_step:
        choice = "" if scored else f", chosen by scores of {config.passes} passes"
        pseudo = f"pseudo-labels from iteration {config.pseudo_start}{choice}"
    return f"{scored}ask for {config.asked} masks{how}, train {lengths} at {config.highest_rate(1):g}; {pseudo}"


def print_iteration(row):
    """One line a person can follow."""
    rated = f"Dice {float(row['dice']):.3f}, Jaccard {float(row['jaccard']):.3f}" if row["dice"] else "not measured"
    print(
        f"iteration {row['iteration']}: {row['annotations']} annotations, {row['pseudo_labels']:>3} pseudo-labels, "
        f"{rated}  ({float(row['seconds_scoring']):.0f} s scoring, {float(row['seconds_training']):.0f} s training)",
        flush=True,
    )


PACKAGES = ["keras", "numpy", "scipy", "scikit-image", "pillow", "h5py", "matplotlib"]


def environment():
    """What the run ran on: versions, git commit, processor, devices, command line."""
    return {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,  # the package may be called tensorflow-cpu
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": os.environ.get("TF_NUM_INTRAOP_THREADS", "all"),
        "devices": [device.name for device in tf.config.list_physical_devices()],
    }


def git_commit():
    """The commit of these scripts, with `-dirty` if one of them was changed since; None where there is no git."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except FileNotFoundError:
        return None
    return commit + "-dirty" * bool(changed) or None


def processor():
    """The processor's name."""
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def find_oracle(config, dataset, parts, run, switches):
    """The oracle of a run, of ceal's. Raises UserError if a ceal.SimulatedOracle would not know an answer."""
    if config.oracle == "folder":
        return ceal.FolderOracle(run, dataset, **switches)
    to_know = np.concatenate([parts.initial, parts.pool])
    unknown = to_know[~dataset.has_mask[to_know]]
    if len(unknown):
        raise UserError(
            f"{dataset.path}: {dataset.ids[unknown[0]]} has no mask ({len(unknown)} such images among those for "
            "--initial and --pool): have a person draw them with --oracle folder"
        )
    return ceal.SimulatedOracle(dataset.masks)


def begin(config, dataset, run):
    """Write config.json and environment.json, or, where an earlier start did, see that the data are the same."""
    fingerprint, path = dataset.fingerprint(), run / "environment.json"
    if (run / "config.json").exists():
        try:
            stored = json.loads(path.read_text())["data_fingerprint"]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not as train.py wrote it ({error}); put it back, or give another --run")
        if stored != fingerprint:
            raise UserError(
                f"{dataset.path} does not hold the images and masks that {run} was begun with; put them back, or give "
                "another --run"
            )
        return
    for name, content in (
        ("environment", {**environment(), "data_fingerprint": fingerprint}),
        ("config", dataclasses.asdict(config)),
    ):
        with whole_file(run / f"{name}.json") as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def main():
    """The command line."""
    config, switches = read_command_line()
    run = Path(config.run)
    if run.exists() and not (run / "config.json").exists() and not (run.is_dir() and only_ours(run)):
        raise UserError(f"{run} exists already and is no run: give another --run, or move it away")
    go_on = f"go on with: python train.py --run {shlex.quote(str(run))}"

    def advise():
        return go_on if (run / "config.json").exists() else "nothing is begun yet; give the same command again"

    with locked(run), stopped_at_once(advise):
        print_devices()
        if config.deterministic == "yes" or (
            config.deterministic == "auto" and not tf.config.list_physical_devices("GPU")
        ):
            tf.config.experimental.enable_op_determinism()
        for leftover in run.glob(".partial-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with open_dataset(config) as dataset:
            parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
            parts = hold_out(parts, dataset, config.validation, config.split_seed)
            oracle = find_oracle(config, dataset, parts, run, switches)
            print_plan(config, dataset, parts)
            begin(config, dataset, run)
            try:
                history = run_loop(config, dataset, parts, run, oracle)
            except ceal.Unanswered as waiting:
                print(f"when more masks are there (or now, with --partial), {go_on}")
                return 2 if waiting.wrong else 0
            except tf.errors.ResourceExhaustedError:
                raise UserError(
                    f"--batch-size {config.batch_size} --filters {config.filters}: not enough memory; lower one of "
                    "them, or the images' size in data.py, and give another --run"
                )
    last = run / f"iteration_{history[-1]['iteration']:0>2}"
    results = f"{run}/history.csv and {run}/dice.png hold" if len(parts.test) else f"{run}/history.csv holds"
    choices = f", {last}/ the choices and their figures" if len(history) > 1 else ""
    print(f"done: {results} the result{choices}")
    weights = shlex.quote(f"{last}/model.weights.h5")
    print(f"masks for your own images: python predict.py IMAGES --weights {weights} --out masks")


def only_ours(run):
    """Whether nothing is in the folder but what a start leaves that was killed before it had written config.json."""
    return all(path.name in ("synthetic.h5", "environment.json") or path.name.startswith(".") for path in run.iterdir())


if __name__ == "__main__":
    run_command(main)
