"""final.py: the network that `train.py --final-steps` trains anew on all annotations of a run."""

import shutil

import numpy as np
import pytest
from conftest import write_blobs

import train
from data import Dataset
from run_folder import METRICS
from trainer import Checkpoint, Trainer
from unet import load_unet
from utils import UserError, read_csv

TINY = "--filters 2 --batch-size 4 --passes 2 --initial 8 --pool 30 --test 10 --initial-epochs 2 --active-epochs 1"
QUERIES = "--no-detection 2 --most-uncertain 2 --random 2 --pseudo-start 1 --pseudo-first 4 --iterations 2"


@pytest.fixture
def go(monkeypatch, capsys):
    """Run `train.py --run RUN ARGUMENTS` in this process; returns (exit code, stdout)."""

    def run(folder, *arguments):
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(folder), *map(str, arguments)])
        return train.main(), capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data file and a finished run, which has trained with pseudo-labels; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    data, run = write_blobs(folder / "blobs.h5", 60, 48, 64), folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", f"train.py --data {data} --run {run} {TINY} {QUERIES}".split())
        train.main()
    return data, run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


def content(folder):
    """What every file of a folder holds, but the time that a training took: bytes, and the weights' numbers."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["history.csv"] = found["history.csv"].rsplit(b",", 1)[0]
    weights = load_unet(folder / "model.weights.h5")[0].get_weights()
    return {**found, "model.weights.h5": [values.tobytes() for values in weights]}


def test_it_is_trained_on_all_annotations_and_on_nothing_else(go, finished, run, monkeypatch):
    trained, fit = [], Trainer.fit

    def spy(self, positions, labels, iteration):
        trained.append((positions, labels))
        fit(self, positions, labels, iteration)

    monkeypatch.setattr(Trainer, "fit", spy)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    code, out = go(run, "--final-steps", 5)
    assert not code
    assert f"{run}/final: 20 annotations, Dice " in out
    assert f"python predict.py IMAGES --weights {run}/final/model.weights.h5" in out
    ((positions, labels),) = trained
    asked = [
        row["id"]
        for k in (1, 2)
        for row in read_csv(run / f"iteration_0{k}" / "queries.csv")
        if row["group"] != "pseudo"
    ]
    with Dataset(finished[0]) as dataset:
        assert set(asked) <= set(dataset.ids[positions])
        assert len(positions) == 8 + len(asked) == 20
        np.testing.assert_array_equal(labels, dataset.masks(positions))
    (row,) = read_csv(run / "final" / "history.csv")
    assert [row[name] for name in ("iteration", "annotations", "pseudo_labels")] == ["2", "20", "0"]
    test = read_csv(run / "final" / "test.csv")
    for name in METRICS:
        assert float(row[name]) == pytest.approx(np.mean([float(image[name]) for image in test]), abs=1e-5)
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / ".final").exists()


def test_an_interrupted_training_ends_like_an_undisturbed_one(go, run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    go(run, "--final-steps", 9)
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    save, left = Checkpoint.save_now_and_then, [4]

    def interrupted(self, iteration, steps):
        save(self, iteration, steps)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save_now_and_then", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(other, "--final-steps", 9)
    assert not (other / "final").exists()
    go(other, "--final-steps", 9)
    assert left[0] == -5  # 4 steps, then the other 5
    assert content(other / "final") == content(run / "final")


def test_the_same_network_is_not_trained_twice_and_another_one_is_kept(go, run):
    go(run, "--final-steps", 3)
    first = content(run / "final")
    assert "there already" in go(run, "--final-steps", 3)[1]
    go(run, "--final-steps", 4)
    assert content(run / "final_1") == first
    assert content(run / "final") != first


def test_during_a_run_it_has_the_annotations_so_far(go, run):
    shutil.rmtree(run / "iteration_02")
    go(run, "--final-steps", 2)
    (row,) = read_csv(run / "final" / "history.csv")
    assert (row["iteration"], row["annotations"]) == ("1", "14")
    assert not (run / "iteration_02").exists()


@pytest.mark.parametrize("steps", [0, -1, 2**31])
def test_impossible_numbers_of_steps_are_refused(go, run, steps):
    with pytest.raises(UserError, match="--final-steps"):
        go(run, "--final-steps", steps)


def test_it_needs_a_run_with_a_finished_iteration(go, run, tmp_path):
    with pytest.raises(UserError, match="a run that is there"):
        go(tmp_path / "new", "--final-steps", 5)
    for folder in run.glob("iteration_*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="has no finished iteration yet"):
        go(run, "--final-steps", 5)
