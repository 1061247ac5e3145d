"""The folds by origin, and folds.py, which trains on all of them but one."""

import importlib.util
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, blobs
from PIL import Image

import data
import folds as trials
from data import NEAR_DUPLICATES, split
from pictures import find_pairs
from run_folder import METRICS
from utils import UserError, read_csv, write_csv

FOLDS = ROOT / "results" / "folds"
COUNTS = {"circles": 220, "slides": 155, "ticks": 418, "bar": 682, "stickers": 125}


@pytest.fixture(scope="module")
def fold_of():
    """The rule of results/folds/origins.py: a function from an id to its fold."""
    spec = importlib.util.spec_from_file_location("origins", FOLDS / "origins.py")
    origins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(origins)
    return origins.fold_of


@pytest.fixture(scope="module")
def folds():
    """The committed file: a dict of id to fold."""
    rows = read_csv(FOLDS / "folds.csv")
    found = {row["id"]: row["fold"] for row in rows}
    assert len(found) == len(rows)  # no id twice
    return found


def test_the_folds_are_the_labelled_images_and_never_test_images(folds, fold_of):
    assert Counter(folds.values()) == COUNTS
    assert folds == {id: fold_of(id) for id in folds}
    tested = {row["id"] for row in read_csv(ROOT / "results" / "best" / "test.csv")}
    assert len(tested) == 400
    assert not tested & folds.keys()


def test_near_duplicates_are_in_one_fold(folds):
    assert all(folds.get(first) == folds.get(second) for first, second in NEAR_DUPLICATES)


@pytest.mark.skipif("ISIC2017_DIR" not in os.environ, reason="ISIC2017_DIR does not name the challenge's folders")
def test_the_folds_cover_the_default_split_of_the_real_images(folds):
    pairs, _ = find_pairs(os.environ["ISIC2017_DIR"])
    ids, part = np.array([pair.id for pair in pairs]), np.array([pair.part for pair in pairs])
    dataset = SimpleNamespace(path="isic2017", ids=ids, part=part, has_mask=np.full(len(ids), True))
    parts = split(dataset)
    assert set(ids[np.concatenate([parts.initial, parts.pool])]) == folds.keys()
    assert not set(ids[parts.test]) & folds.keys()


# ------------------------------------------------------------------------------------------------------ folds.py


TINY = ["--data", "discs.h5", "--filters", "2", "--batch-size", "4", "--initial-steps", "4", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which discs of two folds, a and b, are in the challenge's layout, and a trial `baseline` is done."""
    folder = tmp_path_factory.mktemp("folds")
    pictures, truths = (folder / "isic" / f"ISIC-2017_Training_{name}" for name in ("Data", "Part1_GroundTruth"))
    pictures.mkdir(parents=True)
    truths.mkdir()
    for n, (image, mask) in enumerate(zip(*blobs(14, 48, 64))):
        Image.fromarray(image[..., 0].clip(0, 255).astype(np.uint8)).save(pictures / f"ISIC_{n:07d}.jpg")
        Image.fromarray(np.uint8(255 * mask[..., 0])).save(truths / f"ISIC_{n:07d}_segmentation.png")
    (folder / "out").mkdir()
    rows = [(f"ISIC_{n:07d}", "a" if n < 5 else "b") for n in range(12)]  # two images are in no fold
    write_csv(folder / "out" / "folds.csv", ["id", "fold"], rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["data.py", "isic", "isic", "discs.h5", "--height", "48", "--width", "64"])
        data.main()
        patch.setattr("sys.argv", ["folds.py", "--out", "out", "--trial", "baseline", *TINY])
        trials.main()
    return folder


@pytest.fixture
def go(done, monkeypatch):
    """Run `folds.py --out out ARGUMENTS` in this folder, in this process."""

    def run(*arguments):
        monkeypatch.chdir(done)
        monkeypatch.setattr("sys.argv", ["folds.py", "--out", "out", *arguments])
        return trials.main()

    return run


@pytest.mark.slow
def test_each_fold_is_measured_by_a_network_trained_on_the_others(done):
    for fold, members, others in ("a", range(5), 7), ("b", range(5, 12), 5):
        record = done / "out" / "baseline" / fold
        assert [row["id"] for row in read_csv(record / "test.csv")] == [f"ISIC_{n:07d}" for n in members]
        assert [int(row["annotations"]) for row in read_csv(record / "history.csv")] == [others]
        assert json.loads((record / "config.json").read_text())["initial"] == others
        assert (done / "runs" / "out" / f"baseline-{fold}.weights.h5").exists()
        assert not (done / "runs" / "out" / f"baseline-{fold}").exists()


@pytest.mark.slow
def test_the_images_of_the_fold_do_not_change_the_network(done, go):
    folder, kept = done / "out", (done / "out" / "folds.csv").read_bytes()
    rows = [row for row in read_csv(folder / "folds.csv") if row["id"] != "ISIC_0000000"]
    write_csv(folder / "folds.csv", ["id", "fold"], map(dict.values, rows))
    try:
        go("--trial", "fewer", "--folds", "a", *TINY)
    finally:
        (folder / "folds.csv").write_bytes(kept)
    assert read_csv(folder / "fewer" / "a" / "test.csv") == read_csv(folder / "baseline" / "a" / "test.csv")[1:]
    shutil.rmtree(folder / "fewer")  # the file of folds is another one now


@pytest.mark.slow
def test_an_interrupted_trial_continues_bit_for_bit(done, go, monkeypatch):
    import trainer

    monkeypatch.setattr(trainer.Checkpoint, "EVERY", 0)
    finish, calls = trainer.Checkpoint.save_now_and_then, []

    def stop(self, iteration, steps):
        finish(self, iteration, steps)
        calls.append(steps)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Checkpoint, "save_now_and_then", stop)
    monkeypatch.setattr(trials, "stopped_at_once", lambda _: pytest.MonkeyPatch.context())
    with pytest.raises(KeyboardInterrupt):
        go("--trial", "again", "--folds", "a", *TINY)
    go("--trial", "again", "--folds", "a", *TINY)
    assert calls == [1, 2, 3, 4]
    for name in "test.csv", "history.csv":
        again, before = (read_csv(done / "out" / trial / "a" / name) for trial in ("again", "baseline"))
        assert [[row[m] for m in METRICS] for row in again] == [[row[m] for m in METRICS] for row in before]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes out/TRIAL/FOLD/test.csv, beside out/folds.csv with the folds a (2 images) and b (3)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    write_csv(tmp_path / "out" / "folds.csv", ["id", "fold"], [(id, "a" if id in "pq" else "b") for id in "pqrst"])

    def write(trial, fold, **jaccard):
        (tmp_path / "out" / trial / fold).mkdir(parents=True)
        rows = [(id, value / 2, value) for id, value in jaccard.items()]
        write_csv(tmp_path / "out" / trial / fold / "test.csv", ["id", "dice", "jaccard"], rows)

    return write


def folds_py(monkeypatch, *arguments):
    """Run `folds.py --out out ARGUMENTS` in this process."""
    monkeypatch.setattr("sys.argv", ["folds.py", "--out", "out", *arguments])
    return trials.main()


def test_the_report_compares_the_same_images(written, monkeypatch, capsys):
    written("baseline", "a", p=0.5, q=0.0)
    written("baseline", "b", r=0.5, s=0.5, t=0.5)
    written("better", "b", t=0.5, r=0.75, s=1.0)
    written("better", "a", q=0.25, p=0.75)
    written("half", "a", p=0.0, q=0.0)
    folds_py(monkeypatch, "--report")
    rows = {row["trial"]: row for row in json.loads(Path("out/table.json").read_text())}
    baseline, better, half = rows["baseline"], rows["better"], rows["half"]
    assert (baseline["folds"], baseline["images"], baseline["nothing_right"]) == (2, 5, 1)
    assert (baseline["jaccard"], baseline["dice"], baseline["mean_of_folds"]) == pytest.approx((0.4, 0.2, 0.375))
    assert baseline["worst_fold"] == "a 0.2500"
    assert "jaccard_less_baseline" not in baseline
    mean, low, high = better["jaccard_less_baseline"]
    assert mean == pytest.approx(0.25)  # 0.25, 0.25, 0, 0.25 and 0.5
    assert 0 < low < mean < high < 0.5
    assert better["a_less_baseline"] == pytest.approx([0.25, 0.25, 0.25])
    assert half["jaccard_less_baseline"][0] == pytest.approx(-0.25)
    assert "| better | 2 | 5 | 0.6500 |" in capsys.readouterr().out


def test_trials_that_were_measured_are_compared_with_the_baseline_measured_likewise(written, monkeypatch):
    for trial, value in ("baseline", 0.1), ("baseline-measured-tta", 0.5), ("better-measured-tta", 0.75):
        written(trial, "a", p=value, q=value)
    folds_py(monkeypatch, "--report")
    rows = {row["trial"]: row for row in json.loads(Path("out/table.json").read_text())}
    assert rows["better-measured-tta"]["jaccard_less_baseline"] == pytest.approx([0.25, 0.25, 0.25])
    folds_py(monkeypatch, "--report", "--baseline", "baseline-measured-tta")
    rows = {row["trial"]: row for row in json.loads(Path("out/table.json").read_text())}
    assert rows["baseline"]["jaccard_less_baseline"] == pytest.approx([-0.4, -0.4, -0.4])


def test_an_image_in_two_folds_is_an_error(written, monkeypatch):
    write_csv(Path("out/folds.csv"), ["id", "fold"], [("p", "a"), ("q", "a"), ("p", "b")])
    with pytest.raises(UserError, match=r"folds.csv: p is there twice; each image must have one fold"):
        folds_py(monkeypatch, "--report")


def test_a_record_of_other_folds_is_not_reported(written, monkeypatch):
    written("old", "a", p=0.5, r=0.5)
    with pytest.raises(UserError, match=r"old/a/test.csv: does not have the images of a fold a"):
        folds_py(monkeypatch, "--report")


@pytest.mark.parametrize(("row", "named"), [(["u", ""], "''"), (["u"], "''"), (["u", "../c"], r"'\.\./c'")])
def test_each_image_has_a_fold_with_a_name(written, monkeypatch, row, named):
    with open("out/folds.csv", "a") as file:
        file.write(",".join(row) + "\n")
    with pytest.raises(UserError, match=f"folds.csv: {named} is no name of a fold"):
        folds_py(monkeypatch, "--trial", "x")


@pytest.mark.slow
def test_a_trial_is_measured_at_the_images_own_size(done, go):
    go("--trial", "baseline", "--measure", "isic", "--largest")
    own = read_csv(done / "out" / "baseline-measured-largest" / "b" / "test.csv")
    assert [row["id"] for row in own] == [f"ISIC_{n:07d}" for n in range(5, 12)]
    shutil.rmtree(done / "out" / "baseline-measured-largest" / "a")  # as if it had been stopped
    go("--trial", "baseline", "--measure", "isic", "--largest")
    assert read_csv(done / "out" / "baseline-measured-largest" / "b" / "test.csv") == own


@pytest.mark.slow
def test_a_trial_does_not_go_on_with_other_folds(done, go):
    path = done / "out" / "folds.csv"
    kept = path.read_text()
    *most, last = kept.splitlines()
    path.write_text("\n".join([*most, last.split(",")[0] + ",c"]) + "\n")
    try:
        with pytest.raises(UserError, match=r"out/baseline/.: folds\.csv was another one when it was trained"):
            go("--trial", "baseline", "--folds", "c", *TINY)
    finally:
        path.write_text(kept)


@pytest.mark.slow
def test_a_trial_has_the_same_settings_and_data_in_all_folds(done, go):
    with pytest.raises(UserError, match=r"out/baseline/. was trained with --filters 2, not 3; give another --trial"):
        go("--trial", "baseline", *TINY, "--filters", "3")
    record = done / "out" / "baseline" / "a" / "environment.json"
    kept = record.read_text()
    record.write_text(json.dumps({**json.loads(kept), "data_fingerprint": "another"}))
    try:
        with pytest.raises(
            UserError, match=r"discs.h5: out/baseline/a was trained on other data; give another --trial"
        ):
            go("--trial", "baseline", *TINY)
    finally:
        record.write_text(kept)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--trial x --folds c", "--folds c: not one of a, b"),
        ("--trial ../x", "give the trial a name"),
        ("--preset best", "give the trial a name"),
        ("--trial x --initial 3", "--initial: each fold has its own"),
        ("--trial x --out nowhere", "nowhere/folds.csv is missing"),
        ("--report", "out holds no finished fold"),
        ("--trial x --measure nowhere", "nowhere: there is no such folder"),
        ("--trial x --cluster auto", "--cluster, --worker-cores: not for this command; leave them out"),
        ("--trial x --rotation 200", "--rotation 200.0: must be at most 180 degrees"),
    ],
)
def test_what_cannot_be_done_is_said(written, monkeypatch, arguments, said):
    with pytest.raises(UserError, match=said):
        folds_py(monkeypatch, *arguments.split())
