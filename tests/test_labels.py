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
from experiment import Run, configure, read_base
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
        monkeypatch.setattr("sys.argv", ["labels.py", "--out", "out", *done[1], *map(str, arguments)])
        return labels.main()

    return run


@pytest.mark.parametrize("arm", ["ceal", "random"])
def test_the_labels_are_those_of_the_run(done, arm):
    folder, options = done
    base, run = read_base(options), Run("scarce", arm, 2)
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
    assert rows["ceal", 20]["less_baseline"][0] == pytest.approx(less)
    single = {seed: np.mean(np.subtract(dice["ceal", int(seed)], dice["random", int(seed)])) for seed in "12"}
    assert rows["ceal", 20]["differences_of_seeds"] == pytest.approx(single)
    assert "of seeds" not in table
    assert (folder / "out" / "figures" / "labels.png").exists()


def test_a_mixture_takes_the_queries_of_both_in_turn_without_those_that_people_dispute(done):
    folder, options = done
    base = read_base(options)
    run, config = Run("scarce", "ceal+random", 1), configure(Run("scarce", "ceal", 1), base)
    with Dataset(folder / "blobs.h5") as dataset:
        parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
        both = [
            [id for k in (1, 2, 3) for id in order_of(folder / "runs" / "out" / f"scarce-{arm}-1", k)]
            for arm in ("ceal", "random")
        ]
        expected = list(dict.fromkeys(id for pair in zip(*both) for id in pair))
        for annotations in 2, 9, 2 + len(expected):
            pool, _ = labels.mixed_labels(run, base, dataset, parts, folder / "out", annotations, ())
            positions, masks = pool.training_set()
            assert dataset.ids[positions].tolist()[2:] == expected[: annotations - 2]
            np.testing.assert_array_equal(masks, dataset.masks(positions))
        with pytest.raises(
            UserError, match=rf"--at 39: scarce-ceal\+random-1 has from 2 to {2 + len(expected)} labels"
        ):
            labels.mixed_labels(run, base, dataset, parts, folder / "out", 39, ())
        disputed = {both[0][0], both[0][5], both[0][8]}
        alone = run._replace(arm="ceal-disputed")
        pool, _ = labels.mixed_labels(alone, base, dataset, parts, folder / "out", 2 + 15, disputed)
        assert dataset.ids[pool.training_set()[0]].tolist()[2:] == [id for id in both[0] if id not in disputed]


def test_an_arm_without_disputed_images_is_compared_with_the_same_arm_with_them():
    dice = {"random": 0.5, "random-disputed": 0.6, "ceal": 0.7, "ceal-disputed": 0.9, "ceal+random": 0.8}
    found = {("scarce", arm, 8): {seed: np.full(3, value * seed) for seed in (0.9, 1.1)} for arm, value in dice.items()}
    rows = {row["arm"]: row for row in labels.summarise(found, None)}
    less = {arm: (row["baseline"], round(row["less_baseline"][0], 4)) for arm, row in rows.items() if "baseline" in row}
    assert less == {
        "ceal": ("random", 0.2),
        "ceal+random": ("random", 0.3),
        "ceal-disputed": ("ceal", 0.2),
        "random-disputed": ("random", 0.1),
    }


def order_of(run, iteration):
    """The ids that a run's iteration asked for, in their order."""
    rows = read_csv(run / f"iteration_{iteration:02d}" / "queries.csv")
    return [row["id"] for row in rows if row["group"] != "pseudo"]


def test_a_mixture_is_trained_and_in_the_table(go, done, capsys):
    folder, _ = done
    (folder / "people.csv").write_text("id,dice\nB_0000001,0.2\nB_0000002,0.9\n")
    go("--arms", "random+ceal-disputed", "--seeds", "1", "--at", "8", "--agreement", "people.csv")
    assert "| scarce | random+ceal-disputed | 8 | 1 |" in capsys.readouterr().out


def test_the_final_networks_are_measured_on_images_held_out(done, monkeypatch):
    """With --validation, for choosing: the test images are not looked at."""
    folder, options = done
    monkeypatch.chdir(folder)
    arguments = f"labels.py --out held --arms random --seeds 1 --at 2 --validation 8 {' '.join(options)}"
    monkeypatch.setattr("sys.argv", arguments.split())
    labels.main()
    measured = {row["id"] for row in read_csv(folder / "held" / "final" / "scarce-random-1-2" / "test.csv")}
    with Dataset(folder / "blobs.h5") as dataset:
        test = set(dataset.ids[split(dataset, 12, 30, 10).test])
    assert len(measured) == 8
    assert not measured & test


def test_networks_that_are_there_are_not_trained_again(go, monkeypatch):
    go("--arms", "random", "--seeds", "1", "--at", "8")
    monkeypatch.setattr("final.train_final", lambda *_: pytest.fail("trained again"))
    go("--arms", "random", "--seeds", "1", "--at", "8")


def test_networks_of_other_settings_or_labels_are_not_mixed(go, done, tmp_path, monkeypatch):
    go("--arms", "ceal,random", "--seeds", "1", "--at", "8")
    with pytest.raises(UserError, match=r"random-1-8 was made with --filters 2, not 3: give another --out"):
        go("--arms", "random", "--seeds", "1", "--at", "8", "--filters", "3")
    with pytest.raises(UserError, match=r"records/scarce-ceal-1 was made with --initial 2, not 10: give the settings"):
        go("--arms", "ceal", "--seeds", "1", "--at", "8", "--validation", "8")
    out = shutil.copytree(done[0] / "out", tmp_path / "out")
    arguments = ["labels.py", "--out", str(out), "--arms", "ceal", "--seeds", "1", "--at", "8", *done[1]]
    path = out / "final" / "scarce-ceal-1-8" / "config.json"
    path.write_text(path.read_text().replace('"labels": "', '"labels": "0'))
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match=r"scarce-ceal-1-8 was made with other labels: give another --out"):
        labels.main()
    path = path.with_name("run.json")
    path.write_text(path.read_text().replace('"precision": "float32"', '"precision": "bfloat16"'))
    with pytest.raises(UserError, match=r"scarce-ceal-1-8 .*differ in precision: give each its own --out"):
        labels.report(out, out)


def test_the_labels_of_a_run_with_audit_are_known_without_a_record(tmp_path, monkeypatch):
    options = f"--data {write_blobs(tmp_path / 'blobs.h5', 60, 48, 64)} {TINY} {QUERIES} --audit 2".split()
    base, run = read_base(options), Run("scarce", "random", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["reproduce.py", "--out", "out", "--regimes", "scarce", "--arms", "random", "--seeds", "1", *options],
    )
    reproduce.main()
    with Dataset(tmp_path / "blobs.h5") as dataset:
        _, _, pool, iteration = labels.labels_of(run, base, dataset, tmp_path / "out", 2 + 3 * 8)
        ids = dataset.ids[pool.training_set()[0]].tolist()
    queries = [order_of(tmp_path / "runs" / "out" / run.name, k) for k in (1, 2, 3)]
    assert (iteration, ids[2:]) == (3, [id for some in queries for id in some])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--arms full", "full: not an arm that chooses labels"),
        ("--seeds one", "must be numbers"),
        (
            "--seeds 7 --arms ceal --at 8",
            r"scarce-ceal-7 does not have the run's queries: do this run with reproduce\.py first",
        ),
        ("--arms ceal+full", "full: not an arm that chooses labels"),
        ("--arms ceal+typical_start --at 8", r"ceal\+typical_start: their first labels differ"),
        ("--test 0", "--test or --validation 0 or 1"),
        ("--run runs/out/scarce-ceal-1", "--run: each run has its own"),
        ("--query power", "--query: each run has its own; leave it out, and use --out, --seeds and --arms"),
        ("--arms ceal-disputed", "ceal-disputed: give --agreement"),
        ("--arms ceal --agreement none.csv", r"none\.csv does not exist"),
    ],
)
def test_what_cannot_be_done_is_said(go, arguments, said):
    with pytest.raises(UserError, match=said):
        go(*arguments.split())
