"""Wrong input to every command and every option: exit code 2, one sentence that names it, nothing written.

Pictures and weights are in test_pictures.py and test_weights.py, data.py's folders in test_data.py, the files of an
interrupted run in test_faults.py."""

import dataclasses
import json
import os
import shlex
import shutil
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

import bench
import data
import predict
import train
from config import Config
from data import draw_row, write_dataset
from utils import run_command

SIZE = 48, 64, 1


@pytest.fixture(scope="module")
def template(tmp_path_factory, unet_weights):
    """A folder of good data, weights and an image, and bad ones."""
    folder = tmp_path_factory.mktemp("template")
    write_dataset(folder / "good.h5", (draw_row(n, 1, *SIZE) for n in range(12)), 12, *SIZE, "lesions")
    content, weights = (folder / "good.h5").read_bytes(), unet_weights.read_bytes()
    image = Image.fromarray(draw_row(1, 1, *SIZE).image[..., 0])
    image.save(folder / "good.png")
    bad = {
        "empty": b"",
        "text": b"no file of this kind\n" * 50,
        "truncated": content[: len(content) // 2],
    }
    for name, spoiled in bad.items():
        for suffix in ".h5", ".weights.h5", ".jpg":
            (folder / (name + suffix)).write_bytes(spoiled)
    (folder / "truncated.weights.h5").write_bytes(weights[: len(weights) // 2])
    for name in "good", "nan", "settings":
        (folder / f"{name}.weights.h5").write_bytes(weights)
    with h5py.File(folder / "nan.weights.h5", "r+") as file:
        names = []
        file.visit(names.append)
        arrays = [file[name] for name in names if isinstance(file[name], h5py.Dataset) and file[name].ndim == 4]
        arrays[0][...] = np.nan
    with h5py.File(folder / "settings.weights.h5", "r+") as file:
        file.attrs["unet"] = json.dumps({**json.loads(file.attrs["unet"]), "height": 50})
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "deep.png")
    for name in "folder", "of_one", "folder.png":
        (folder / name).mkdir()
    image.save(folder / "of_one" / "good.jpg")
    write_bad_truths(folder, draw_row(1, 1, *SIZE))
    spoil_data(folder, content)
    return folder


def write_bad_truths(folder, row):
    """Write a folder for each name in TRUTHS."""
    content = {
        "grey": row.image[..., 0],
        "truncated": row.mask * 255,
        "of_other_size": row.mask[:, 1:] * 255,
        "no_lesion": row.mask * 0,
    }
    for name in TRUTHS:
        path = folder / name / "good_segmentation.png"
        path.parent.mkdir()
        if name in content:
            Image.fromarray(content[name]).save(path)
    (folder / "no_picture" / "good_segmentation.png").write_text("no picture")
    truncated = folder / "truncated" / "good_segmentation.png"
    truncated.write_bytes(truncated.read_bytes()[:-40])


def spoil_data(folder, content):
    """Write HDF5 files that are almost data files: bad_NAME.h5."""

    def without(name):
        return lambda file: file.__delitem__(name)

    def instead(name, **dataset):
        return lambda file: (file.__delitem__(name), file.create_dataset(name, **dataset))

    spoils = {
        "no_masks": without("masks"),
        "no_version": lambda file: file.attrs.__delitem__("layout_version"),
        "version": lambda file: file.attrs.update(layout_version="two"),
        "short": instead("ids", data=["A"] * 11, dtype=h5py.string_dtype()),
        "numbers": instead("ids", data=np.arange(12)),
        "parts": instead("part", data=["train"] * 3, dtype=h5py.string_dtype()),
        "marks": instead("has_mask", data=[True] * 3),
        "flat": instead("images", shape=(12, 48 * 64), dtype="u1"),
        "small_masks": instead("masks", shape=(12, 24, 64), dtype="u1"),
        "float": instead("images", shape=(12, *SIZE), dtype="f4"),
        "none": lambda file: [instead(name, shape=(0, *file[name].shape[1:]), dtype="u1")(file) for name in file],
        "group": lambda file: (file.__delitem__("images"), file.create_group("images")),
    }
    for name, spoil in spoils.items():
        (folder / f"bad_{name}.h5").write_bytes(content)
        with h5py.File(folder / f"bad_{name}.h5", "r+") as file:
            spoil(file)


@pytest.fixture
def work(template, tmp_path, monkeypatch):
    """A copy of the template to work in, and a pipe that is never written to."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "pipe.h5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SCRIPTS = {"data": data, "train": train, "predict": predict, "bench": bench}
TRAIN = "train --data good.h5 --run r --initial 4 --pool 4 --test 2 --no-detection 1 --most-uncertain 1 --random 1"
LONG = 300 * "x"
PREDICT = "predict good.png --weights good.weights.h5 --out masks"
TRUTHS = "grey", "truncated", "of_other_size", "no_lesion", "no_picture"  # folders of bad true masks
IMAGES = "nowhere.jpg", "folder", "good.png of_one", "empty.jpg", "text.jpg", "deep.png", "good.h5"


def wrong_values(field):
    """Values that a setting of train.py must reject."""
    least = field.metadata["minimum"]
    if field.metadata["choices"]:
        return ["nonsense", "''"]
    return {
        str: [],
        int: ["x", "1.5", "1e3", least and least - 1, 2**31, 10**30] if least else ["x", "1.5", "1e3", -1, 2**31],
        float: ["x", "nan", "inf", "-0.1"],
    }[field.type]


def option(field):
    return f"--{field.name.replace('_', '-')}"


SIZES = "100", "8", "0", "-16", "1600000", "4112", "1e3", "ten"
BAD_DATA = (
    "no_masks",
    "no_version",
    "version",
    "short",
    "numbers",
    "parts",
    "marks",
    "flat",
    "small_masks",
    "float",
    "none",
    "group",
)
CASES = [
    # settings of the wrong type or out of their range
    *(f"{TRAIN} {option(f)} {value}" for f in dataclasses.fields(Config) for value in wrong_values(f)),
    *(f"{TRAIN} --dropout {value}" for value in (0, 1, 2)),
    *(f"{TRAIN} {option}" for option in ("--learning-rate 0", "--rotation 181", "--width-shift 1.5")),
    *(f"{TRAIN} {option}" for option in ("--artefacts 1.1", "--artefacts -1", "--weight-average 1", "--loss iou")),
    *(f"{TRAIN} {option}" for option in ("--filters 20000", "--filters 2000000000", "--no-such-option 1", "--run")),
    *(f"{TRAIN} {option}" for option in ("--wait", "--partial", "--oracle human", "--oracle folder --wait --partial")),
    # combinations that make no sense
    f"{TRAIN} --pool 2",
    f"{TRAIN} --no-detection 0 --most-uncertain 0 --random 0",
    f"{TRAIN} --initial 400",
    # data files and run folders
    *(f"{TRAIN} --data {name}" for name in ("nowhere.h5", "folder", "empty.h5", "text.h5", "truncated.h5", "good.png")),
    *(f"{TRAIN} --data {name}" for name in ("pipe.h5", "good.weights.h5", "/dev/zero", "bad_flat.h5", "''")),
    *(f"{TRAIN} --run {name}" for name in ("of_one", "good.png", "good.png/r", "''", "pipe.h5", LONG)),
    # images and weights
    *(f"predict {name} --out masks --weights good.weights.h5" for name in IMAGES),
    *(
        f"{PREDICT} --weights {name}.weights.h5"
        for name in ("nowhere", "empty", "text", "truncated", "nan", "settings")
    ),
    *(f"{PREDICT} --weights {name}" for name in ("folder", "good.h5", "good.png")),
    *(f"{PREDICT} {option}" for option in ("--passes 0", "--passes x", "--passes 9999999999999", "--precision half")),
    *(f"{PREDICT} {option}" for option in ("--passes -1", "--passes 1.5", "--precision ''", "--no-such-option")),
    *(f"{PREDICT} --weights {name}" for name in ("pipe.h5", "/dev/zero", "''", ".")),
    *(f"{PREDICT} --out {name}" for name in ("good.png", "good.png/x", "pipe.h5", LONG)),
    "predict --weights good.weights.h5 --out masks",
    # data.py
    "data",
    "data isik of_one x.h5",
    "data isic",
    *(f"data isic {name} x.h5" for name in ("nowhere", "good.png", "folder", "of_one", "pipe.h5", "''")),
    *(f"data synthetic x.h5 --{side} {size}" for side in ("height", "width") for size in SIZES),
    *(
        f"data {command} x.h5 --channels {value}"
        for command in ("isic of_one", "synthetic")
        for value in (0, 2, "grey")
    ),
    *(f"data synthetic x.h5 --images {value}" for value in (0, -1, "1e3", "x", 10**9, 10**400)),
    *(f"data synthetic x.h5 --seed {value}" for value in (-1, 1.5, "x")),
    *(f"data synthetic {name}" for name in ("good.h5", "folder", "good.png/x.h5", "folder --force", LONG)),
    *(f"data info {name}" for name in ("nowhere.h5", "folder", "good.png", "good.weights.h5", "pipe.h5", "/dev/zero")),
    *(f"data info {name}.h5" for name in ("empty", "text", "truncated", *(f"bad_{name}" for name in BAD_DATA))),
    *(f"data show {name}.h5 x.png" for name in ("nowhere", "truncated", "pipe", "bad_short")),
    *(f"data show good.h5 x.png --images {value}" for value in (0, -3, 1001, 10**12, "x")),
    *(f"data show good.h5 {name}" for name in ("good.png", "x", "x.jpg", "folder.png", "good.png/x.png")),
    # bench.py
    *(f"bench {option}" for option in ("--weights good.weights.h5", "--preset tiny", "--quick 3", "--json")),
    *(f"bench --data {name}" for name in ("nowhere.h5", "good.png", "good.h5", "bad_short.h5")),
    *(f"bench --data good.h5 --weights {name}.weights.h5" for name in ("nowhere", "empty", "nan")),
    *(f"bench --json {name}" for name in ("folder", "good.png/x.json")),
    # predict.py: thresholds and true masks
    *(f"{PREDICT} --threshold {value}" for value in ("0", "1", "-0.5", "1.5", "nan", "half")),
    f"{PREDICT} --try-thresholds",
    *(f"{PREDICT} --truth {name}" for name in ("nowhere", "good.png", "folder", "masks", *TRUTHS)),
    f"{PREDICT} --truth folder --tta yes",
]
# What the sentence names, if it is not the last argument.
NAMED = {
    f"{TRAIN} --no-such-option 1": "--no-such-option",
    f"{TRAIN} --run good.png/r": "good.png",
    f"{TRAIN} --no-detection 0 --most-uncertain 0 --random 0": "--random",
    f"{TRAIN} --pool 2": "--pool 2",
    f"{TRAIN} --initial 400": "--initial",
    f"{PREDICT} --out good.png/x": "good.png",
    **{f"predict {name} --out masks --weights good.weights.h5": name for name in IMAGES},
    "predict good.png of_one --out masks --weights good.weights.h5": "good.jpg",
    "predict --weights good.weights.h5 --out masks": "INPUT",
    "bench --weights good.weights.h5": "--weights",
    "bench --quick 3": "3",
    "bench --json good.png/x.json": "good.png",
    "data": "COMMAND",
    "data isik of_one x.h5": "isik",
    "data isic": "source",
    "data synthetic x.h5 --images 1000000000": "x.h5 needs",
    "data synthetic good.png/x.h5": "good.png",
    "data synthetic folder --force": "folder",
    "data show good.h5 good.png/x.png": "good.png",
    **{f"data isic {name} x.h5": name.strip("'") for name in ("nowhere", "good.png", "folder", "of_one", "pipe.h5")},
    **{f"data show {name}.h5 x.png": f"{name}.h5" for name in ("nowhere", "truncated", "pipe", "bad_short")},
    "data isic '' x.h5": "ISIC-2017_Training_Data",
    f"{PREDICT} --truth folder --tta yes": "yes",
}


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else path.is_dir() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence_and_exit_code_2(case, work, monkeypatch, capsys):
    script, *arguments = shlex.split(case)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    before = everything(work)
    with pytest.raises(SystemExit) as exit:
        run_command(SCRIPTS[script].main)
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    last = error.strip().splitlines()[-1]
    assert "error: " in last
    assert "Traceback" not in error
    assert NAMED.get(case, arguments[-1] if arguments else "") in last
    assert sum("error: " in line for line in error.splitlines()) == 1
    after = everything(work)
    masks = [path for path in after if path.relative_to(work).parts[0] == "masks"]  # of the good images
    assert {path: what for path, what in after.items() if path not in masks} == before
    assert not [path for path in masks if "partial" in path.name]


def test_there_are_enough_cases():
    assert len(set(CASES)) >= 60
