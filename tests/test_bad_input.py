"""train.py, predict.py and bench.py against wrong input: exit code 2, one sentence that names it, nothing written.

data.py's cases are in test_data.py, those of a run that goes on in test_faults.py."""

import json
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

import bench
import predict
import train
from data import draw_row, write_dataset
from utils import run_command

SIZE = 48, 64, 1


@pytest.fixture
def work(tmp_path, unet_weights, monkeypatch):
    """An empty folder with good data, weights and an image, and bad ones."""
    monkeypatch.chdir(tmp_path)
    write_dataset("good.h5", (draw_row(n, 1, *SIZE) for n in range(12)), 12, *SIZE, "lesions")
    content, weights = (tmp_path / "good.h5").read_bytes(), unet_weights.read_bytes()
    image = Image.fromarray(draw_row(1, 1, *SIZE).image[..., 0])
    image.save("good.png")
    bad = {
        "empty": b"",
        "text": b"no file of this kind\n" * 50,
        "truncated": content[: len(content) // 2],
    }
    for name, spoiled in bad.items():
        for suffix in ".h5", ".weights.h5", ".jpg":
            (tmp_path / (name + suffix)).write_bytes(spoiled)
    (tmp_path / "truncated.weights.h5").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "good.weights.h5").write_bytes(weights)
    (tmp_path / "nan.weights.h5").write_bytes(weights)
    with h5py.File("nan.weights.h5", "r+") as file:
        names = []
        file.visit(names.append)
        arrays = [file[name] for name in names if isinstance(file[name], h5py.Dataset) and file[name].ndim == 4]
        arrays[0][...] = np.nan
    (tmp_path / "settings.weights.h5").write_bytes(weights)
    with h5py.File("settings.weights.h5", "r+") as file:
        file.attrs["unet"] = json.dumps({**json.loads(file.attrs["unet"]), "height": 50})
    Image.fromarray(np.zeros((40, 40), np.uint16)).save("deep.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "of_one").mkdir()
    image.save(tmp_path / "of_one" / "good.jpg")
    for name, threshold in ("threshold", 2), ("no_number", "high"):
        (tmp_path / f"{name}.weights.h5").write_bytes(weights)
        with h5py.File(f"{name}.weights.h5", "r+") as file:
            file.attrs["unet"] = json.dumps({**json.loads(file.attrs["unet"]), "threshold": threshold})
    write_bad_truths(tmp_path, draw_row(1, 1, *SIZE))
    return tmp_path


def write_bad_truths(folder, row):
    """A folder of the name for each of TRUTHS."""
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


SCRIPTS = {"train": train, "predict": predict, "bench": bench}
TRAIN = "train --data good.h5 --run r --initial 4 --pool 4 --test 2 --no-detection 1 --most-uncertain 1 --random 1"
PREDICT = "predict good.png --weights good.weights.h5 --out masks"
TRUTHS = "grey", "truncated", "of_other_size", "no_lesion", "no_picture"  # folders of bad true masks
IMAGES = "nowhere.jpg", "folder", "good.png of_one", "empty.jpg", "text.jpg", "deep.png", "good.h5"
CASES = [
    # settings of the wrong type or out of their range
    *(f"{TRAIN} {option}" for option in ("--passes 0", "--passes -3", "--passes 1e3", "--passes 99999999999999999999")),
    *(
        f"{TRAIN} {option}"
        for option in ("--dropout 0", "--dropout 1", "--dropout 2", "--dropout nan", "--dropout half")
    ),
    *(f"{TRAIN} {option}" for option in ("--learning-rate 0", "--learning-rate -1", "--learning-rate inf")),
    *(f"{TRAIN} {option}" for option in ("--filters 0", "--batch-size 0", "--batch-size ten", "--iterations -1")),
    *(f"{TRAIN} {option}" for option in ("--rotation 181", "--rotation -1", "--width-shift 1.5", "--width-shift nan")),
    *(f"{TRAIN} {option}" for option in ("--seed -1", "--split-seed -1", "--pseudo-start 0", "--pseudo-first -1")),
    *(f"{TRAIN} {option}" for option in ("--initial-epochs 0", "--active-epochs 0", "--initial 0", "--test -1")),
    *(
        f"{TRAIN} {option}"
        for option in ("--preset papre", "--precision float8", "--devices 2", "--deterministic maybe")
    ),
    *(f"{TRAIN} {option}" for option in ("--distance outside", "--no-such-option 1", "--run")),
    *(f"{TRAIN} {option}" for option in ("--wait", "--partial", "--oracle human", "--oracle folder --wait --partial")),
    # combinations that make no sense
    f"{TRAIN} --pool 2",
    f"{TRAIN} --no-detection 0 --most-uncertain 0 --random 0",
    f"{TRAIN} --initial 400",
    # data files and run folders
    *(f"{TRAIN} --data {name}" for name in ("nowhere.h5", "folder", "empty.h5", "text.h5", "truncated.h5", "good.png")),
    *(f"{TRAIN} --run {name}" for name in ("of_one", "good.png", "good.png/r")),
    # images and weights
    *(f"predict {name} --out masks --weights good.weights.h5" for name in IMAGES),
    *(
        f"{PREDICT} --weights {name}.weights.h5"
        for name in ("nowhere", "empty", "text", "truncated", "nan", "settings")
    ),
    *(f"{PREDICT} --weights {name}" for name in ("folder", "good.h5", "good.png")),
    *(f"{PREDICT} {option}" for option in ("--passes 0", "--passes x", "--passes 9999999999999", "--precision half")),
    *(f"{PREDICT} --out {name}" for name in ("good.png", "good.png/x")),
    "predict --weights good.weights.h5 --out masks",
    # bench.py
    *(
        f"bench {option}"
        for option in ("--weights good.weights.h5", "--preset tiny", "--data nowhere.h5", "--data good.png")
    ),
    # predict.py as an instrument
    *(f"{PREDICT} --threshold {value}" for value in ("0", "1", "-0.5", "1.5", "nan", "half")),
    *(f"{PREDICT} --weights {name}.weights.h5" for name in ("threshold", "no_number")),
    *(f"{PREDICT} --truth {name}" for name in ("nowhere", "good.png", "folder", "masks", *TRUTHS)),
    f"{PREDICT} --truth folder --tta yes",
]
# What the sentence names, where it is not the last word.
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
    f"{PREDICT} --truth folder --tta yes": "yes",
}


def everything(folder):
    return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence_and_exit_code_2(case, work, monkeypatch, capsys):
    script, *arguments = case.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    before = everything(work)
    with pytest.raises(SystemExit) as exit:
        run_command(SCRIPTS[script].main)
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    last = error.strip().splitlines()[-1]
    assert "error: " in last
    assert "Traceback" not in error
    assert NAMED.get(case, arguments[-1]) in last
    after = everything(work)
    masks = [path for path in after if path.relative_to(work).parts[0] == "masks"]  # of the images that are good
    assert {path: what for path, what in after.items() if path not in masks} == before
    assert not [path for path in masks if "partial" in path.name]


def test_there_are_enough_cases():
    assert len(set(CASES)) >= 60
