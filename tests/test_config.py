"""config.py: its names match the tables, and help and errors do not need TensorFlow."""

import subprocess
import sys

import keras
import pytest
from conftest import ROOT

import batches
import config
import sampler
import trainer
import unet
from config import SWITCHES, read_command_line
from experiment import ARMS
from utils import UserError


def test_the_names_of_the_choices_are_those_of_the_tables():
    assert tuple(unet.LOSSES) == config.LOSSES
    assert tuple(unet.PRECISIONS) == config.PRECISIONS
    assert tuple(sampler.MEASURES) == config.MEASURES
    assert {changes["start"] for changes in ARMS.values() if "start" in changes} == set(config.STARTS)
    assert all(trainer.learning_rate(schedule, 0.5) <= 1 for schedule in config.SCHEDULES)
    for kind in config.AUGMENTATIONS:
        assert batches.augmentation(10, 0.1, seed=1, kind=kind).layers
    assert all(hasattr(keras.initializers, name) for name in config.INITIALIZERS)


WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules["tensorflow"] = sys.modules["keras"] = None  # importing them fails
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "command",
    [
        "train.py --help",
        "train.py --filters 0",
        "train.py --data missing.h5 --dropout 2",
        "train.py --query unknown",
        "predict.py --help",
        "predict.py missing.jpg",
        "reproduce.py --help",
        "reproduce.py --out x --arms unknown",
        "folds.py --help",
        "folds.py --out missing --report",
        "data.py --help",
        "data.py info missing.h5",
    ],
)
def test_help_and_refused_options_do_not_wait_for_tensorflow(tmp_path, command):
    script, *options = command.split()
    run = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(ROOT / script), *options]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in options else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_concerns_a_person_is_refused_without_one(switch):
    with pytest.raises(UserError, match=f"--{switch}: only for --oracle folder"):
        read_command_line([f"--{switch}"])
    assert read_command_line(["--oracle", "folder", f"--{switch}"])[1][switch]


def test_corrections_go_with_waiting_and_with_going_on():
    for other in "--wait", "--partial":
        assert read_command_line(["--oracle", "folder", "--correct", other])[1]["correct"]
    with pytest.raises(UserError, match="--wait and --partial exclude each other"):
        read_command_line(["--oracle", "folder", "--wait", "--partial", "--correct"])
