"""Config: every setting of a run, the presets, and the command line of train.py.

Holds the names of all choices and never imports TensorFlow, so that help and refused options answer at once.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import ceal
from run_folder import locked, only_ours
from strategies import STRATEGIES
from utils import UserError

# The names of what unet.py, sampler.py and trainer.py offer; a test holds them against the tables there.
INITIALIZERS = "GlorotUniform", "HeNormal"  # as published, which is Keras' default, or as is usual before ReLU
LOSSES = "dice", "dice_bce"
MEASURES = "variance", "entropy", "bald"
PRECISIONS = "float32", "bfloat16", "float16"
SCHEDULES = "constant", "cosine"
QUERIES = " ".join(f"{name}: {strategy.select.__doc__.splitlines()[0]}" for name, strategy in STRATEGIES.items())


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
    """Every setting of a run. The defaults are those of the paper or of its published code."""

    preset: str = setting("paper", "which settings to start from", choices=tuple(PRESETS))
    data: str = setting("datasets/isic2017.h5", "the HDF5 file that data.py made; auto: draw one into the run's folder")
    run: str = setting("auto", "the folder to write; auto: runs/PRESET-DATE-TIME")
    precision: str = setting("float32", "what the network computes in, for training and scoring", choices=PRECISIONS)
    deterministic: str = setting(
        "auto", "the same bits in every run, which a GPU is slower at; auto: on a CPU", choices=("auto", "yes", "no")
    )
    devices: str = setting("one", "all: share every batch out among all GPUs", choices=("one", "all"))
    seed: int = setting(1, "the run's seed: weights, batches, augmentation, dropout, random choices", 0)

    split_seed: int = setting(2017, "the split's own seed; keep it, so that results compare", 0)
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
    loss: str = setting("dice", "minus the Dice coefficient, or that plus the cross-entropy", choices=LOSSES)
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
    distance: str = setting(
        "inside", "the weight of a pixel in the score: ceal.distance_weight", choices=tuple(ceal.DISTANCE_WEIGHTS)
    )
    query: str = setting("paper", f"which images to ask for. {QUERIES}", choices=tuple(STRATEGIES))
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


DEMO_SIZE = {"height": 64, "width": 80, "channels": 1}
# Of one start of a run, and no settings of it.
SWITCHES = {"wait": "watch the folder until all is answered", "partial": "go on with what is answered"}


# ----------------------------------------------------------------------------------------------------- the command line


def argument_parser(description=None):
    """The command line: an option for each field of Config, then what is not a setting of a run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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


def read_command_line(arguments=None, description=None):
    """The command line as a checked Config, and which of SWITCHES are given, a dict of bool. The settings are those of
    a run that is there already; else the preset's, then those given. With --force the folder of an earlier run is moved
    aside."""
    given = vars(argument_parser(description).parse_args(arguments))
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
