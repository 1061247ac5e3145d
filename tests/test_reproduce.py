"""reproduce.py and experiment.py: what each arm changes, the statistics by hand, and a whole small experiment."""

import json
import shutil
import sys

import h5py
import numpy as np
import pytest
from conftest import write_blobs
from scipy.stats import norm

import figures
import reproduce
from config import read_config
from experiment import (
    ARMS,
    REGIMES,
    Run,
    area,
    common_iterations,
    configure,
    curves,
    interval,
    interval_over_seeds,
    keep_record,
    needed,
    rate_pool,
    reached,
    read_pool,
    read_pools,
    region_edges,
    summarise,
)
from utils import UserError, read_csv, write_csv

PAPER = read_config([])
RUNS = [Run(regime, arm, 1) for regime in REGIMES for arm in ARMS]


# ---------------------------------------------------------------------------------------------------------- the arms


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.regime}-{run.arm}")
def test_every_arm_trains_as_long_on_as_many_annotations(run):
    config = configure(run, PAPER)
    steps = config.initial_steps + config.iterations * config.active_steps
    assert steps == 6000 + 9 * 2 * 24  # 757 images in batches of 32
    assert config.initial + config.pool == 1600
    annotations = config.initial + config.iterations * config.asked
    at_first, at_the_end = {"scarce": (100, 415), "paper": (600, 915)}[run.regime]
    special = {"full": 1600, "full_in_stages": 1600, "no_queries": at_first}
    assert annotations == special.get(run.arm, at_the_end)
    assert (config.seed, config.test, config.split_seed) == (1, 400, PAPER.split_seed)


def test_every_arm_is_what_its_name_says():
    config = {arm: configure(Run("scarce", arm, 1), PAPER) for arm in ARMS}
    pseudo = {arm: (c.pseudo_first, c.pseudo_step) for arm, c in config.items()}
    assert {arm for arm, counts in pseudo.items() if counts == (0, 0)} == {
        "no_pseudo",
        "random",
        "random_start",
        "typical_start",
        "no_queries",
        "full_in_stages",
    }
    starts = {"random_start", "typical_start"}
    assert {arm for arm, c in config.items() if c.query == "uniform"} == {"random", "random_pseudo", *starts}
    assert {arm for arm, c in config.items() if c.start == "typical"} == {"typical_start"}
    assert {arm for arm, c in config.items() if c.initial_seed} == starts
    assert configure(Run("scarce", "random_start", 7), PAPER).initial_seed == 7
    assert {arm for arm, c in config.items() if c.query in ("undisputed", "strata")} == {"undisputed", "strata"}
    assert {arm: c.uncertainty for arm, c in config.items() if c.uncertainty != "variance"} == {
        "entropy": "entropy",
        "bald": "bald",
    }
    assert {arm for arm, c in config.items() if c.distance == "none"} == {"no_distance"}
    assert {arm for arm, c in config.items() if c.query == "power"} == {"power"}
    assert {arm for arm, c in config.items() if c.no_detection_rule == "empty"} == {"empty_only"}
    assert config["uncertain_only"].most_uncertain == 35
    assert config["ceal"].most_uncertain == 10


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("ceal", "no_pseudo", 5),
        ("random", "random_pseudo", 5),
        ("ceal", "random", 1),
        ("bald", "entropy", 1),
        ("random", "no_queries", 1),
        ("strata", "undisputed", 1),
        ("random", "random_start", 0),  # other labels at first
        ("random_start", "typical_start", 0),
        ("no_queries", "full_in_stages", 0),
        ("ceal", "full", 0),
        ("ceal", "ceal", 0),
    ],
)
def test_arms_share_the_iterations_in_which_they_do_not_differ(one, other, shared):
    runs = Run("scarce", one, 1), Run("scarce", other, 1)
    assert common_iterations(*runs, PAPER) == common_iterations(*runs[::-1], PAPER) == shared
    assert common_iterations(runs[0], Run("scarce", other, 2), PAPER) == 0
    assert common_iterations(runs[0], Run("paper", other, 1), PAPER) == 0


def test_images_for_validation_come_on_top_of_the_first_labels():
    """Every arm of a regime then has as many labels as without, and the same images held out."""
    base = read_config(["--validation", "300"])
    for regime, initial in ("scarce", 100), ("paper", 600):
        for arm in set(ARMS) - {"full", "full_in_stages"}:
            config = configure(Run(regime, arm, 1), base)
            assert (config.initial, config.pool, config.validation) == (initial + 300, 1300 - initial, 300)


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [1, 2, 3]), ("6-8", [6, 7, 8]), ("2-2", [2]), ("x", []), ("3-1", [])]
)
def test_seeds_are_a_number_or_a_range(text, seeds):
    assert list(reproduce.seeds_of(text)) == seeds


# -------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_covers_seeds_and_images():
    """For independent seeds and images, the variance of the mean is the sum of both means' variances."""
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(0, 0.3, 30), rng.normal(0, 1, 300)
    values = 0.1 + seeds[:, None] + images
    low, high = interval(values)
    half = norm.ppf(0.975) * np.sqrt(seeds.var() / 30 + images.var() / 300)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_the_interval_over_seeds_takes_the_images_as_they_are():
    values = np.array([[0.1, 0.3], [0.4, 0.2], [0.6, 0.8]])  # means of seeds 0.2, 0.3, 0.7
    half = 4.302653 * np.std([0.2, 0.3, 0.7], ddof=1) / np.sqrt(3)  # Student's t with two degrees of freedom
    assert interval_over_seeds(values) == pytest.approx((0.4 - half, 0.4 + half))


def test_the_area_is_the_curves_mean_height():
    # From 100 to 200 at 0.75 on average, from 200 to 400 at 0.9: (100 * 0.75 + 200 * 0.9) / 300.
    assert area([100, 200, 400], [0.7, 0.8, 1.0]) == pytest.approx(0.85)
    assert area([100, 200], np.array([[0, 1], [0.2, 0.4]])).tolist() == pytest.approx([0.5, 0.3])
    assert area([100, 100, 100], [0.7, 0.8, 1.0]) == pytest.approx(0.825)  # no queries


def test_an_arm_without_queries_is_drawn_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, vector: drawn.append(figure))
    drawn = []
    asked = {"random": [100, 135, 170], "no_queries": [100] * 3, "full_in_stages": [1600] * 3, "full": [1600]}
    found = {}
    for arm, n in asked.items():
        record = {"annotations": n, "dice": [0.8] * len(n), "jaccard": [0.7], "images": np.ones((9, len(n)))}
        found["scarce", arm] = {1: record}
    figures.figure_curves(curves(found), tmp_path / "dice.png")
    (ax,) = drawn[0].axes
    places = {bars.get_label(): bars[0].get_xdata() for bars in ax.containers}
    assert list(places) == ["random (1)", "no_queries, 100 labels (1)", "full_in_stages, 1600 labels (1)"]
    assert all(np.abs(x - [100, 135, 170]).max() < 10 for x in places.values())
    rows = {row["arm"]: row for row in summarise(found)}
    assert (rows["no_queries"]["annotations"], rows["no_queries"]["area"]) == (100, pytest.approx(0.8))


def test_annotations_needed_are_where_the_mean_curve_first_gets_there():
    runs = {seed: {"annotations": [10, 20, 30], "dice": [0.5, dice, 0.9]} for seed, dice in ((1, 0.7), (2, 0.9))}
    assert needed(runs, 0.95, 0.84) == 20  # 0.8 is more than 0.798
    assert needed(runs, 0.99, 0.84) == 30
    assert needed(runs, 0.99, 1.0) is None
    assert needed(runs, 0.95, None) is None


def test_full_alone_has_no_curve_and_nothing_to_be_compared_with(tmp_path):
    found = {
        ("scarce", "full"): {1: {"annotations": [1600], "dice": [0.8], "jaccard": [0.7], "images": np.ones((3, 1))}}
    }
    reproduce.draw(found, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert summarise(found)[0]["dice"] == 0.8


def test_a_curve_reaches_a_dice_where_it_first_comes_to_it():
    annotations, dice = np.array([100, 135, 170, 205]), np.array([0.80, 0.82, 0.81, 0.83])
    levels = 0.79, 0.80, 0.81, 0.82, 0.825, 0.84
    found = [reached(annotations, dice, level) for level in levels]
    assert found == pytest.approx([100, 100, 117.5, 135, 196.25, np.nan], nan_ok=True)


def test_the_regions_are_counted_as_the_paper_draws_them():
    # 80 bins from 0 to 80; the fullest is the first: certain below 6, most uncertain from 47 on.
    score = np.array([0, 0.1, 0.2, 0.3, 5.9, 6.1, 46, 47.5, 80])
    dice = np.array([0.9, 0.9, 0, 0.1, 0.79, 0.2, 0.9, 0.9, 0.1])
    group = np.array(["pseudo", "", "no_detection", "", "", "random", "", "", "most_uncertain"])
    found = rate_pool({"score": score, "dice": dice, "group": group}, region_edges(score))
    assert (found["certain_and_right"], found["certain_and_poor"]) == (3, 2)
    assert (found["uncertain_region"], found["most_uncertain_region"]) == (2, 2)
    assert (found["dice_pseudo"], found["dice_no_detection"], found["dice_random"]) == (0.9, 0.0, 0.2)
    assert found["dice_pool"] == pytest.approx(dice.mean(), abs=1e-4)


# -------------------------------------------------------------------------------------------------- a whole experiment

TINY = """--filters 2 --initial 12 --pool 40 --test 6 --initial-steps 4 --active-steps 3 --batch-size 4 --passes 2
--iterations 2 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 2 --pseudo-first 2 --pseudo-step 2"""


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    reproduce.main()


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory):
    """Three arms, two of them with common iterations, and two seeds. Returns the working folder."""
    folder = tmp_path_factory.mktemp("reproduction")
    data = write_blobs(folder / "blobs.h5", 60, 32, 32)
    arguments = ["--out", "res", "--seeds", 2, "--regimes", "scarce", "--arms", "no_pseudo,ceal,random", "--jobs", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start(patch, *arguments, "--data", data.name, *TINY.split())
    return folder


@pytest.mark.slow
def test_a_table_figures_and_every_number(reproduction):
    out = reproduction / "res"
    rows = read_csv(out / "table.csv")
    assert [(row["arm"], row["seeds"], row["annotations"]) for row in rows] == [
        ("ceal", "2", "10"),
        ("no_pseudo", "2", "10"),
        ("random", "2", "10"),
    ]
    results = json.loads((out / "results.json").read_text())
    histories = [read_csv(out / "records" / f"scarce-ceal-{seed}" / "history.csv") for seed in (1, 2)]
    ends = [float(history[-1]["dice"]) for history in histories]
    assert results["table"][0]["dice"] == pytest.approx(np.mean(ends))
    assert results["table"][0]["dice_sd"] == pytest.approx(np.std(ends, ddof=1))
    assert results["runs"]["scarce"]["ceal"]["1"]["dice"] == [float(row["dice"]) for row in histories[0]]
    mean, low, high = results["table"][0]["dice_against_random"]
    assert low <= mean <= high
    names = {path.name for path in (out / "figures").iterdir()}
    drawn = "dice", "difference", "saved", "pool", "scores_scarce", "regions_scarce"
    assert {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")} == names


@pytest.mark.slow
def test_a_record_holds_each_test_images_dice_and_no_weights(reproduction):
    for record in (reproduction / "res" / "records").iterdir():
        assert not list(record.glob("*.h5"))
        test, history = read_csv(record / "test_dice.csv"), read_csv(record / "history.csv")
        assert len(test) == 6
        for k, row in enumerate(history):
            mean = np.mean([float(image[f"iteration_{k:02d}"]) for image in test])
            assert mean == pytest.approx(float(row["dice"]), abs=1e-4)


def test_a_record_holds_all_iterations_in_their_order(tmp_path):
    """There are more than a hundred, an old folder is ignored, and all must have the same number of test images."""
    for k in range(102):
        write_csv(tmp_path / "run" / f"iteration_{k:02d}" / "test.csv", ["id", "dice"], [["a", k / 200], ["b", 1]])
    write_csv(tmp_path / "run" / "history.csv", ["iteration"], [[k] for k in range(102)])
    for name in "config.json", "environment.json", "iteration_07_old":
        (tmp_path / "run" / name).touch()
    keep_record(Run("scarce", "random", 1), tmp_path / "run", tmp_path)
    (row, _) = read_csv(tmp_path / "records" / "scarce-random-1" / "test_dice.csv")
    assert list(row.values()) == ["a", *(str(k / 200) for k in range(102))]

    write_csv(tmp_path / "run" / "iteration_07" / "test.csv", ["id", "dice"], [["a", 1]])
    with pytest.raises(UserError, match="run: not as this program wrote it"):
        keep_record(Run("scarce", "random", 2), tmp_path / "run", tmp_path)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["scarce-random-1"]


@pytest.mark.slow
def test_an_arm_that_begins_with_anothers_iterations_is_the_same_as_one_that_does_not(reproduction, monkeypatch):
    """The arm `ceal`, which began with iterations of `no_pseudo`, is run again alone."""
    monkeypatch.chdir(reproduction)
    config = json.loads((reproduction / "runs/res/scarce-ceal-1/config.json").read_text())
    assert (config["pseudo_first"], config["run"]) == (2, "runs/res/scarce-ceal-1")
    # The same number of jobs, because the number of threads changes how sums are rounded.
    arguments = ["--out", "alone", "--regimes", "scarce", "--only", "ceal,1", "--jobs", 2]
    start(monkeypatch, *arguments, "--data", "blobs.h5", *TINY.split())
    weights = []
    for out in "res", "alone":
        folder = reproduction / "runs" / out / "scarce-ceal-1" / "iteration_02"
        with h5py.File(folder / "model.weights.h5") as file:
            weights.append(file["layers/conv2d_3/vars/0"][()])
        weights.append((folder / "queries.csv").read_text())
    np.testing.assert_array_equal(weights[0], weights[2])
    assert weights[1] == weights[3]
    assert not (reproduction / "alone" / "table.csv").exists()


@pytest.mark.slow
def test_finished_runs_are_not_done_again(reproduction, monkeypatch, capsys):
    monkeypatch.chdir(reproduction)
    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("a run was started"))
    arguments = ["--out", "res", "--seeds", 2, "--regimes", "scarce", "--arms", "ceal,random"]
    start(monkeypatch, *arguments, "--data", "blobs.h5", *TINY.split())
    assert "4 of 4 runs are done already" in capsys.readouterr().out
    before = (reproduction / "res" / "table.csv").read_bytes()
    start(monkeypatch, "--out", "res", "--report", *TINY.split())
    assert (reproduction / "res" / "table.csv").read_bytes() == before


@pytest.mark.slow
def test_a_record_of_other_settings_is_refused_by_name(reproduction, monkeypatch):
    monkeypatch.chdir(reproduction)
    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("a run was started"))
    expected = r"scarce-ceal-1 was made with --active-learning-rate 0.0, not 0.001"
    for more in [], ["--report"]:
        with pytest.raises(UserError, match=expected):
            start(monkeypatch, "--out", "res", *TINY.split(), "--active-learning-rate", 0.001, *more)


@pytest.mark.slow
def test_records_of_different_data_are_refused_by_name(reproduction, monkeypatch, tmp_path):
    shutil.copytree(reproduction / "res" / "records", tmp_path / "res" / "records")
    monkeypatch.chdir(tmp_path)
    changed = tmp_path / "res/records/scarce-ceal-1/environment.json"
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "data_fingerprint": "0"}))
    with pytest.raises(UserError, match=r"scarce-ceal-1 and .*scarce-random-2 differ in their --data"):
        start(monkeypatch, "--out", "res", "--report", *TINY.split())


@pytest.mark.slow
def test_runs_on_other_data_than_the_records_are_refused_before_they_start(reproduction, monkeypatch, tmp_path):
    monkeypatch.chdir(reproduction)
    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("a run was started"))
    write_blobs(tmp_path / "other.h5", 58, 32, 32)
    more = "--out", "res", "--seeds", 3, *TINY.split(), "--data"
    with pytest.raises(UserError, match=r"other.h5 does not hold the images and masks of res/records"):
        start(monkeypatch, *more, tmp_path / "other.h5")
    with pytest.raises(UserError, match=r"none.h5: there is no such file"):
        start(monkeypatch, *more, "none.h5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [("environment.json", "{"), ("history.csv", ""), ("history.csv", "annotations,dice,jaccard\n100,0.8,0.7\n")]
    + [("test_dice.csv", content) for content in ("", "id,iteration_00\na,0.8\n", "id,iteration_00\na,?\n")]
    + [("pool.csv", "iteration,pool\n1,40\n"), ("queries.csv", "id\na\n"), ("pool_images.npz", "")],
)
def test_a_damaged_record_is_refused_by_name(reproduction, monkeypatch, tmp_path, file, content):
    shutil.copytree(reproduction / "res" / "records", tmp_path / "res" / "records")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "res/records/scarce-ceal-1" / file).write_text(content)
    with pytest.raises(UserError, match=r"scarce-ceal-1: not as this program wrote it"):
        start(monkeypatch, "--out", "res", "--report", *TINY.split())


@pytest.mark.slow
def test_an_unfinished_record_is_ignored_and_an_unknown_one_is_named(reproduction, monkeypatch, tmp_path):
    shutil.copytree(reproduction / "res" / "records", tmp_path / "res" / "records")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "res/records/.partial-scarce-bald-1").mkdir()
    start(monkeypatch, "--out", "res", "--report", *TINY.split())
    for strange in "scarce-ceal-1-old", "scarce-cael-1":
        (tmp_path / "res/records" / strange).mkdir()
        with pytest.raises(UserError, match=f"{strange}: not the name of a record"):
            start(monkeypatch, "--out", "res", "--report", *TINY.split())
        (tmp_path / "res/records" / strange).rmdir()


@pytest.mark.slow
def test_iterations_of_other_settings_are_not_shared(reproduction, monkeypatch):
    monkeypatch.chdir(reproduction)
    run, folder = Run("scarce", "uncertain_only", 1), reproduction / "runs/res/scarce-uncertain_only-1"
    for options in ["--width-shift", "0.3"], []:
        base = read_config([*TINY.split(), *options])
        reproduce.begin_from_another(run, folder, base)
        assert folder.exists() == (not options)


def test_a_run_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_blobs(tmp_path / "few.h5", 12, 32, 32)
    with pytest.raises(UserError, match=r"1 runs failed.*runs/res/scarce-ceal-1\.log"):
        start(monkeypatch, "--out", "res", "--regimes", "scarce", "--only", "ceal,1", "--data", "few.h5")
    assert "few.h5 has 12 training images, too few" in (tmp_path / "runs/res/scarce-ceal-1.log").read_text()
    assert not (tmp_path / "res").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "--arms ceal,cael",
        "--regimes scarc",
        "--only cael,1",
        "--only ceal,one",
        "--only ceal",
        "--seeds 0",
        "--jobs 0",
        "--report",
        "--report --only ceal,1",
        "--iterations 0",
        "--passes 0",
        "--test 1",
        "--oracle folder",
        "--validation 20",
        "--seed 3",
        "--run=runs/x",
        "--force",
    ],
)
def test_wrong_options_are_refused_by_name(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"cael|scarc:|--only|--seeds|--report|--iterations 0|--passes 0|--validation|each run has",
    ):
        start(monkeypatch, "--out", "res", *wrong.split())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- selections and scores in records


@pytest.fixture
def finished(tmp_path):
    """A finished run of two iterations that scored pools of 5 and 3 images."""
    run, pools = tmp_path / "run", {1: "edcba", 2: "cae"}
    for k in range(3):
        write_csv(run / f"iteration_{k:02d}" / "test.csv", ["id", "dice"], [["t", 0.5]])
    for k, ids in pools.items():
        folder = run / f"iteration_{k:02d}"
        scores = [(id, k + n / 7, n / 11) for n, id in enumerate(ids)]
        write_csv(folder / "scores.csv", ["id", "uncertainty", "dice"], scores)
        write_csv(folder / "queries.csv", ["id", "group"], [(ids[0], "no_detection"), (ids[1], "pseudo")])
        (folder / "examples.png").touch()
    write_csv(run / "history.csv", ["iteration"], [[k] for k in range(3)])
    for name in "config.json", "environment.json":
        (run / name).write_text("{}")
    return run


@pytest.mark.parametrize("seed", [1, 7])
def test_a_record_keeps_what_was_selected_and_each_pool_images_score_and_dice(finished, tmp_path, seed):
    keep_record(Run("scarce", "power", seed), finished, tmp_path)
    record = tmp_path / "records" / f"scarce-power-{seed}"
    rows = [tuple(row.values()) for row in read_csv(record / "queries.csv")]
    assert rows == [("1", "e", "no_detection"), ("1", "d", "pseudo"), ("2", "c", "no_detection"), ("2", "a", "pseudo")]
    with np.load(record / "pool_images.npz") as stored:
        assert stored["ids"].tolist() == list("abcde")
        assert stored["iterations"].tolist() == [1, 2]
        np.testing.assert_allclose(stored["score"][1], [2 + 1 / 7, np.nan, 2, np.nan, 2 + 2 / 7], rtol=1e-6)
        np.testing.assert_allclose(stored["dice"][0], np.array([4, 3, 2, 1, 0]) / 11, rtol=1e-6)
    for k, pool in read_pools(record).items():
        expected = read_pool(finished / f"iteration_{k:02d}")
        order = np.argsort(expected["id"])
        assert pool["id"].tolist() == expected["id"][order].tolist()
        assert pool["group"].tolist() == expected["group"][order].tolist()
        np.testing.assert_allclose(pool["score"], expected["score"][order], rtol=1e-6)


def test_the_pools_of_older_records_are_read(finished, tmp_path):
    for k in 1, 2:
        for name in "scores.csv", "queries.csv":
            shutil.copy(finished / f"iteration_{k:02d}" / name, tmp_path / f"iteration_{k:02d}_{name}")
    pools = read_pools(tmp_path)
    assert {k: pool["id"].tolist() for k, pool in pools.items()} == {1: list("edcba"), 2: list("cae")}
    assert pools[2]["group"].tolist() == ["no_detection", "pseudo", ""]
