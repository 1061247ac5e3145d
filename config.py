"""Config: every setting of a run, the presets, and the command line of train.py.

The names of all choices are here. This file never imports TensorFlow, so that --help and errors appear at once.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import ceal
from run_folder import locked, only_ours
from strategies import STRATEGIES
from utils import UserError

# The choices that batches.py, unet.py, sampler.py and trainer.py offer; a test compares these names with those there.
AUGMENTATIONS = "paper", "strong", "far", "wild"
INITIALIZERS = "GlorotUniform", "HeNormal"  # as published (Keras' default); as is usual before ReLU
LOSSES = "dice", "dice_bce", "jaccard_bce", "tversky_bce"
MEASURES = "variance", "entropy", "bald"
NORMALISATIONS = "data", "image"
PRECISIONS = "float32", "bfloat16", "float16"
SCHEDULES = "constant", "cosine"
STARTS = "random", "typical"
QUERIES = " ".join(f"{name}: {strategy.select.__doc__.splitlines()[0]}" for name, strategy in STRATEGIES.items())


def setting(default, help, minimum=None, choices=None):
    """A field of Config: its default, the help text of its option, its minimum and its choices."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "choices": choices})


# Training settings chosen on labelled images: results/LOG.md, "How the settings and presets were chosen".
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
    "paper": {"initial_steps": 6000},  # 10 epochs of 600 batches: docs/method.md, "The initial training"
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
        "initial_steps": 13000,
        "normalisation": "image",
        "loss": "jaccard_bce",
        "augmentation": "far",
        "artefacts": 0.5,
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

    preset: str = setting("paper", "the settings to start from", choices=tuple(PRESETS))
    data: str = setting("datasets/isic2017.h5", "HDF5 file made by data.py; auto: draw synthetic lesions for this run")
    run: str = setting("auto", "the folder to write; auto: runs/PRESET-DATE-TIME")
    precision: str = setting("float32", "numerical precision of training and scoring", choices=PRECISIONS)
    deterministic: str = setting(
        "auto", "same result in every run, bit for bit (slower on a GPU); auto: on a CPU", choices=("auto", "yes", "no")
    )
    devices: str = setting("one", "all: split every batch among all GPUs", choices=("one", "all"))
    seed: int = setting(1, "seed of initial weights, batches, augmentation, dropout and random selections", 0)

    split_seed: int = setting(2017, "seed of the split; keep it, so that results can be compared", 0)
    initial_seed: int = setting(
        0, "draw the images labelled at first anew with this seed, and keep the test images; 0: as --split-seed says", 0
    )
    start: str = setting(
        "random", "the images labelled at first: at random, or typical ones (strategies.typical)", choices=STARTS
    )
    initial: int = setting(600, "images labelled before the first training", 1)
    pool: int = setting(1000, "unlabelled images that the oracle may be asked to annotate", 0)
    test: int = setting(400, "test images, never scored, queried or trained on; 0: nothing is measured", 0)
    validation: int = setting(
        0, "hold out this many labelled images and measure on them, not on the test images, to choose settings", 0
    )
    oracle: str = setting(
        "simulated",
        "source of annotations: the masks in the data file, or a person with a folder, or with Label Studio",
        choices=("simulated", "folder", "labelstudio"),
    )
    labelstudio: str = setting("http://localhost:8080", "with --oracle labelstudio: the address of the server")

    filters: int = setting(32, "filters of the network's first level; each of the four deeper levels doubles them", 1)
    dropout: float = setting(0.5, "dropout rate at the bottleneck, in training and in Monte Carlo passes", 0)
    normalisation: str = setting(
        "data",
        "data: by mean and deviation of the images labelled at first; image: then each image by its own",
        choices=NORMALISATIONS,
    )
    initializer: str = setting("GlorotUniform", "how the initial weights are drawn", choices=INITIALIZERS)
    learning_rate: float = setting(1e-5, "Adam's highest learning rate in the initial training", 0)
    active_learning_rate: float = setting(0.0, "highest learning rate in later trainings; 0: as --learning-rate", 0)
    loss: str = setting(
        "dice",
        "dice: minus the Dice coefficient of the batch; dice_bce: plus cross-entropy; jaccard_bce, tversky_bce: "
        "cross-entropy minus each image's Jaccard or Tversky index",
        choices=LOSSES,
    )
    schedule: str = setting("constant", "learning rate within a training (trainer.learning_rate)", choices=SCHEDULES)
    batch_size: int = setting(32, "images per training step", 1)
    initial_epochs: int = setting(10, "epochs of the initial training", 1)
    active_epochs: int = setting(2, "epochs of each iteration's training", 1)
    initial_steps: int = setting(0, "steps of the initial training; 0: set by --initial-epochs", 0)
    active_steps: int = setting(0, "steps of each iteration's training; 0: set by --active-epochs", 0)
    weight_average: float = setting(
        0.0, "decay of an exponential average of the weights that replaces them after each training; 0: none", 0
    )
    augment: str = setting(
        "initial", "which trainings are augmented: the initial one, all or none", choices=("initial", "all", "none")
    )
    augmentation: str = setting(
        "paper", "paper: rotate, shift, flip; strong, far, wild: more (batches.augmentation)", choices=AUGMENTATIONS
    )
    artefacts: float = setting(
        0.0, "share of augmented images with drawn artefacts: hairs, rulers, pen, bubbles, stickers, dark corners", 0
    )
    rotation: float = setting(40.0, "augmentation: largest rotation in degrees, in either direction", 0)
    width_shift: float = setting(0.2, "augmentation: largest shift, as a share of the width, in either direction", 0)

    iterations: int = setting(9, "iterations of score, query, pseudo-label, train", 0)
    passes: int = setting(20, "T: Monte Carlo dropout predictions per image", 1)
    uncertainty: str = setting("variance", "measure of a pixel's uncertainty (sampler.mc_dropout)", choices=MEASURES)
    distance: str = setting(
        "inside", "weight of a pixel in the score (ceal.distance_weight)", choices=tuple(ceal.DISTANCE_WEIGHTS)
    )
    query: str = setting("paper", f"which images to annotate. {QUERIES}", choices=tuple(STRATEGIES))
    least_agreement: float = setting(
        0.72, "with --query undisputed: leave out images with a lower expected agreement (utils.expected_agreement)", 0
    )
    no_detection: int = setting(10, "oracle queries with the lowest scores, per iteration", 0)
    no_detection_rule: str = setting(
        "lowest",
        "empty: --no-detection takes only images with an empty prediction; more at random instead",
        choices=("lowest", "empty"),
    )
    most_uncertain: int = setting(10, "oracle queries from the last bins of the score histogram, per iteration", 0)
    random: int = setting(15, "random oracle queries, per iteration", 0)
    audit: int = setting(
        0, "more oracle queries, uniformly at random, per iteration, that estimate the Dice of the whole pool", 0
    )
    pseudo_start: int = setting(5, "first iteration with pseudo-labels", 1)
    pseudo_first: int = setting(20, "pseudo-labels in iteration --pseudo-start", 0)
    pseudo_step: int = setting(20, "additional pseudo-labels in each later iteration", 0)

    @property
    def asked(self):
        """The number of oracle queries per iteration."""
        return 0 if self.query == "none" else self.no_detection + self.most_uncertain + self.random

    def epoch_steps(self, images):
        """The number of training steps in an epoch of `images` images."""
        return -(-images // self.batch_size)

    def training_steps(self, images, iteration):
        """The number of training steps of an iteration (0: the initial training) on `images` images."""
        steps, epochs = self.initial_steps, self.initial_epochs
        if iteration:
            steps, epochs = self.active_steps, self.active_epochs
        return steps or epochs * self.epoch_steps(images)

    def highest_rate(self, iteration):
        """The highest learning rate of an iteration (0: the initial training)."""
        return (iteration and self.active_learning_rate) or self.learning_rate


DEMO_SIZE = {"height": 64, "width": 80, "channels": 1}
# Options of one start of a run; they are not stored as its settings.
SWITCHES = {
    "wait": "wait until every image is answered",
    "partial": "continue with the answers received so far",
    "correct": "accept changes of answers that are in use already; they count from the next iteration on",
}
OTHER_SWITCHES = "final_steps", "tensorboard"


# ----------------------------------------------------------------------------------------------------- the command line


def argument_parser(description=None):
    """The command line: one option per field of Config, then the options that are not settings of a run."""
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
    parser.add_argument(
        "--final-steps",
        type=int,
        metavar="N",
        help="train a network anew for N steps on all annotations of an existing run, into RUN/final",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write events for TensorBoard to RUN/tensorboard",
    )
    parser.add_argument("--force", action="store_true", help="start again; an existing run of this name is moved aside")
    for name, help in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"with --oracle folder or labelstudio: {help}")
    add_cluster_options(parser, "score the pool")
    return parser


def add_cluster_options(parser, work):
    """Add --cluster and --worker-cores, which are not stored as settings either. work: what the cluster does."""
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help=f"{work} on a Ray cluster: auto (the one of this machine), an address, or local (start one here)",
    )
    parser.add_argument(
        "--worker-cores", type=int, default=1, metavar="N", help="with --cluster, without GPUs: cores of a worker (1)"
    )


def cluster_options(given):
    """Take the two options out of a dict of options: (address or None, cores). Raises UserError if they are wrong."""
    address, count = given.pop("cluster"), given.pop("worker_cores")
    if count < 1 or (count > 1 and address is None):
        raise UserError(f"--worker-cores {count}: give at least 1, and --cluster with it")
    return address, count


def read_command_line(arguments=None, description=None):
    """Returns the settings, a checked Config; SWITCHES and OTHER_SWITCHES, a dict; and `cluster_options`.

    An existing run keeps its settings; a new run has those of its preset and the given options. With --force an
    existing run is moved aside. Raises UserError for invalid settings."""
    given = vars(argument_parser(description).parse_args(arguments))
    switches, others = ({name: given.pop(name) for name in names} for names in (SWITCHES, OTHER_SWITCHES))
    steps = others["final_steps"]
    cluster = cluster_options(given)
    force, run = given.pop("force"), Path(given.get("run", "auto"))
    if (run / "config.json").exists() and not force:
        config = stored_config(run, given)
    else:
        preset = dict(PRESETS[given.get("preset", "paper")])
        for training in "initial", "active":
            if f"{training}_epochs" in given:  # else the preset's steps would win over the given epochs
                preset.pop(f"{training}_steps", None)
        config = Config(**{**preset, **given})
        check(config)
    if config.run == "auto":
        config.run = time.strftime(f"runs/{config.preset}-%Y%m%d-%H%M%S")
    if config.oracle == "simulated" and any(switches.values()):
        given = " and ".join(f"--{name}" for name in switches if switches[name])
        raise UserError(f"{given}: only for --oracle folder or labelstudio; add it, or leave this out")
    if switches["wait"] and switches["partial"]:
        raise UserError("--wait and --partial exclude each other: give only one of them")
    if steps is not None and (force or not 1 <= steps < 2**31 or not (run / "config.json").exists()):
        raise UserError(f"--final-steps {steps}: must be at least 1, with --run for a run that is there")
    if steps and others["tensorboard"]:
        raise UserError("--tensorboard: not with --final-steps; leave it out")
    if force and ((run / "config.json").exists() or (run.is_dir() and only_ours(run))):
        if Path.cwd().is_relative_to(run.resolve()):
            raise UserError(f"--force: {run} contains the current folder and cannot be moved; change to another folder")
        aside = run.with_name(f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        with locked(run):
            run.rename(aside)
        print(f"moved {run} to {aside}")
    return config, {**switches, **others}, cluster


def read_config(arguments=None):
    """Only the Config of `read_command_line`, for a command that starts several runs."""
    config, switches, cluster = read_command_line(arguments)
    if switches["tensorboard"]:
        raise UserError("--tensorboard: only for train.py; leave it out")
    if cluster != (None, 1):
        raise UserError("--cluster, --worker-cores: not for this command; leave them out")
    return config


def stored_config(run, given):
    """The Config of an existing run; only its batch size may change, in case the memory does not suffice, and the
    address of Label Studio. Raises UserError if config.json is damaged or another given setting differs."""
    path = run / "config.json"
    try:
        config = Config(**json.loads(path.read_text()))
        check(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the settings of this version of train.py ({error}); give another --run")
    config.run = str(run)
    config.batch_size = given.get("batch_size", config.batch_size)
    config.labelstudio = given.get("labelstudio", config.labelstudio)
    check(config)
    for name, value in given.items():
        stored = getattr(config, name)
        if name not in ("run", "labelstudio") and value != stored:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {value}: {run} was started with {stored}; leave the option out, or give another --run"
            )
    return config


def check(config):
    """Raise UserError for an invalid setting or combination of settings."""
    for field in dataclasses.fields(config):
        value, minimum, choices = (getattr(config, field.name), *map(field.metadata.get, ("minimum", "choices")))
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or (choices and value not in choices):
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be {choices or field.type.__name__}")
        if minimum is not None and not minimum <= value < 2**31:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be at least {minimum} and below 2**31")
    if not 0 < config.dropout < 1:
        raise UserError(f"--dropout {config.dropout}: must be above 0 and below 1; no dropout gives no uncertainty")
    if config.no_detection_rule == "empty" and config.distance != "inside":
        raise UserError(
            f"--no-detection-rule empty needs --distance inside: with {config.distance}, an empty prediction does not "
            "score 0"
        )
    if config.least_agreement > 1:
        raise UserError(f"--least-agreement {config.least_agreement}: must be at most 1, which is full agreement")
    if config.learning_rate == 0:
        raise UserError("--learning-rate 0: must be above 0, or the network learns nothing")
    if config.width_shift > 1:
        raise UserError(f"--width-shift {config.width_shift}: must be at most 1, because it is a share of the width")
    if config.artefacts > 1:
        raise UserError(f"--artefacts {config.artefacts}: must be at most 1, because it is a share of the images")
    if config.weight_average >= 1:
        raise UserError(f"--weight-average {config.weight_average}: must be below 1, for instance 0.999")
    if config.rotation > 180:
        raise UserError(f"--rotation {config.rotation}: must be at most 180 degrees")
    if config.query == "none" and (config.oracle != "simulated" or config.audit):
        given = "--audit" if config.audit else f"--oracle {config.oracle}"
        raise UserError(f"--query none: there are no queries; leave out {given}")
    if config.iterations and not config.asked and config.query != "none":
        raise UserError("no queries: --no-detection, --most-uncertain and --random are all 0; increase one of them")
    if config.iterations and config.asked + config.audit > config.pool:
        count = config.asked + config.audit
        raise UserError(f"--pool {config.pool}: must be at least {count}, the number of queries per iteration")
    check_address(config)
    if config.validation >= config.initial:
        raise UserError(f"--validation {config.validation}: must be below --initial {config.initial}")


def check_address(config):
    """Raise UserError if --labelstudio is not the address of a server, or holds a password, which would be stored."""
    if config.oracle != "labelstudio" and config.labelstudio != Config.labelstudio:
        raise UserError("--labelstudio: only for --oracle labelstudio; add it, or leave this out")
    try:
        address = urlsplit(config.labelstudio)
        right = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # of the port
        right = False
    if "@" in config.labelstudio or "?" in config.labelstudio:
        raise UserError("--labelstudio: give the address alone; the token belongs into LABEL_STUDIO_API_KEY")
    if not right:
        raise UserError(f"--labelstudio {config.labelstudio}: not an address such as http://localhost:8080")
