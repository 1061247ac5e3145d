"""labels.py: which labels a run had, and the networks that are trained anew on them."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_blobs

import labels
import reproduce
import train
from data import Dataset, split
from experiment import Run, configure
from utils import UserError, read_csv

pytestmark = pytest.mark.slow  # two arms of two runs are done first
TINY = "--filters 2 --batch-size 4 --passes 2 --initial 12 --pool 30 --test 10 --initial-steps 3 --active-steps 2"
QUERIES = "--no-detection 2 --most-uncertain 2 --random 2 --pseudo-start 1 --pseudo-first 4 --iterations 3"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which reproduce.py has done two arms: (folder, the options of the runs)."""
    folder = tmp_path_factory.mktemp("labels")
    options = f"--data {write_blobs(folder / 'blobs.h5', 60, 48, 64)} {TINY} {QUERIES}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            "sys.argv", f"reproduce.py --out out --regimes scarce --arms ceal,random --seeds 2 {options}".split()
        )
        reproduce.main()
    return folder, options.split()


@pytest.fixture
def go(done, monkeypatch):
    """Run `labels.py --out out ARGUMENTS` in this folder, in this process."""

    def run(*arguments):
        monkeypatch.chdir(done[0])
        monkeypatch.setattr("sys.argv", ["labels.py", "--out", "out", *map(str, arguments), *done[1]])
        return labels.main()

    return run


@pytest.mark.parametrize("arm", ["ceal", "random"])
def test_the_labels_are_those_of_the_run(done, arm):
    folder, options = done
    base, run = labels.read_config(options), Run("scarce", arm, 2)
    config, place = configure(run, base), folder / "runs" / "out" / run.name
    with Dataset(folder / "blobs.h5") as dataset:
        parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
        expected = set(dataset.ids[parts.initial])
        for k, annotations in enumerate((2, 8, 14, 20)):
            if k:
                rows = read_csv(place / f"iteration_{k:02d}" / "queries.csv")
                expected |= {row["id"] for row in rows if row["group"] != "pseudo"}
            pool, iteration = labels.labels_after(run, config, dataset, parts, folder / "out", annotations)
            positions, masks = pool.training_set()
            assert (iteration, set(dataset.ids[positions])) == (k, expected)
            np.testing.assert_array_equal(masks, dataset.masks(positions))
        with pytest.raises(UserError, match=r"--at 9: scarce-.*-2 never has this number of labels"):
            labels.labels_after(run, config, dataset, parts, folder / "out", 9)


def test_the_networks_are_those_of_final_steps(go, done, tmp_path, monkeypatch, capsys):
    folder, _ = done
    go("--arms", "ceal,random", "--seeds", "1-2", "--at", "8,20")
    table = capsys.readouterr().out
    assert len([line for line in table.splitlines() if line.startswith("| scarce | ")]) == 4
    assert not list((folder / "runs" / "out").glob("final-*"))
    run = shutil.copytree(folder / "runs" / "out" / "scarce-ceal-2", tmp_path / "run")
    steps = json.loads((folder / "out" / "final" / "scarce-ceal-2-20" / "config.json").read_text())["steps"]
    assert steps == 3 + 3 * 2
    monkeypatch.setattr("sys.argv", ["train.py", "--run", str(run), "--final-steps", str(steps)])
    train.main()
    for name in "config.json", "test.csv":
        assert (run / "final" / name).read_bytes() == (
            folder / "out" / "final" / "scarce-ceal-2-20" / name
        ).read_bytes()
    rows = {(row["arm"], row["labels"]): row for row in json.loads((folder / "out" / "labels.json").read_text())}
    dice = {
        (arm, seed): [
            float(row["dice"]) for row in read_csv(folder / "out" / "final" / f"scarce-{arm}-{seed}-20" / "test.csv")
        ]
        for arm in ("ceal", "random")
        for seed in (1, 2)
    }
    assert rows["ceal", 20]["dice"] == pytest.approx(np.mean([dice["ceal", 1], dice["ceal", 2]]))
    less = np.mean([np.subtract(dice["ceal", seed], dice["random", seed]) for seed in (1, 2)])
    assert rows["ceal", 20]["less_random"][0] == pytest.approx(less)
    assert (folder / "out" / "figures" / "labels.png").exists()


def test_networks_that_are_there_are_not_trained_again(go, monkeypatch):
    go("--arms", "random", "--seeds", "1", "--at", "8")
    monkeypatch.setattr(labels, "labels_after", lambda *_: pytest.fail("trained again"))
    go("--arms", "random", "--seeds", "1", "--at", "8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--arms full", "full: not an arm that chooses labels"),
        ("--seeds one", "must be numbers"),
        (
            "--seeds 7 --arms ceal --at 8",
            r"scarce-ceal-7/queries\.csv is missing: do this run with reproduce\.py first",
        ),
    ],
)
def test_what_cannot_be_done_is_said(go, arguments, said):
    with pytest.raises(UserError, match=said):
        go(*arguments.split())
