"""quality.py: the numbers of answers.csv and quality.csv, by hand, in a whole run, and after any interruption."""

import shutil

import numpy as np
import pytest
from conftest import write_blobs
from test_faults import content, finish, start

import ceal
import quality
import train
from data import Dataset, split
from quality import Quality, is_stable, read_answers_of, read_quality, sentence, write_quality
from trainer import Trainer
from unet import load_unet
from utils import UserError, read_csv, segmentation_metrics, write_csv

OPTIONS = """
    --filters 2 --initial 9 --pool 40 --test 0 --initial-epochs 3 --active-epochs 1 --batch-size 4 --passes 2
    --iterations 3 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 2 --pseudo-first 2 --pseudo-step 2
    --learning-rate 0.003
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 50, 32, 32)


@pytest.fixture(scope="module")
def a_run(data_file, tmp_path_factory):
    """A whole run without test images; its folder and what `quality` had printed."""
    run = tmp_path_factory.mktemp("runs") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "--run", str(run), "--data", str(data_file), *OPTIONS.split()])
        train.main()
    return run


# --------------------------------------------------------------------------------------------------------- by hand

SQUARE = np.zeros((4, 4), np.uint8)
SQUARE[:2, :2] = 1  # 4 pixels
LINE = np.zeros((4, 4), np.uint8)
LINE[0] = 1  # 4 pixels, 2 of them in SQUARE


def compare(pool, unanswered, tmp_path, rows, proposed=SQUARE):
    """`before_training` with the same proposal for every image; ids are A to F."""
    write_csv(tmp_path / "queries.csv", ["id", "group"], rows)

    def propose(positions, iteration):
        assert iteration == 2
        return ((proposed * np.float32(0.9), proposed * np.float32(0.01)) for _ in positions)

    estimates = Quality(np.array(list("ABCDEF")), np.array([], int), 1, propose, None)
    return estimates.before_training(pool, unanswered, 2, tmp_path, tmp_path)


def a_pool():
    return ceal.Pool(np.array([0]), SQUARE[None], np.arange(1, 6), np.array([], int))


def test_an_answer_is_compared_with_the_proposal_of_its_image(tmp_path):
    pool = a_pool()
    unanswered = pool.unlabelled
    pool.annotate(np.array([3, 1, 5]), np.stack([LINE, SQUARE, LINE]))
    pool.reject(np.array([2]))
    groups = [("D", "no_detection"), ("B", "random"), ("C", "random"), ("E", "most_uncertain"), ("F", "pseudo")]
    means = compare(pool, unanswered, tmp_path, groups)
    # SQUARE and LINE share 2 of their 4 pixels each: Dice 4 / 8, Jaccard 2 / 6. F was asked for earlier.
    assert (tmp_path / "answers.csv").read_text().split() == [
        "id,group,dice,jaccard",
        "D,no_detection,0.5,0.333333",
        "B,random,1.0,1.0",
        "F,late,0.5,0.333333",
    ]
    assert (means["answers"], means["dice"], means["jaccard"]) == ("3", "0.666667", "0.555555")
    assert (means["dice_no_detection"], means["dice_random"], means["dice_most_uncertain"]) == (
        "0.500000",
        "1.000000",
        "",
    )
    maps = read_answers_of(tmp_path)
    assert maps["ids"] == list("DBCEF")
    assert maps["states"] == ["drawn", "drawn", "rejected", "missing", "drawn"]
    np.testing.assert_array_equal(maps["answers"], np.stack([LINE, SQUARE, 0 * LINE, 0 * LINE, LINE]) > 0)
    np.testing.assert_array_equal(maps["proposals"], np.stack(5 * [SQUARE]) > 0)


def test_a_correction_of_an_image_that_was_trained_on_is_not_compared(tmp_path):
    pool = a_pool()
    unanswered = pool.unlabelled
    pool.annotate(np.array([1]), SQUARE[None])
    pool.correct(np.array([0]), LINE[None])
    compare(pool, unanswered, tmp_path, [("B", "random")])
    assert [row["id"] for row in read_csv(tmp_path / "answers.csv")] == ["B"]


def test_ids_that_are_not_utf_8_are_kept(tmp_path):
    id = b"\xe9\xff.x".decode("utf-8", "surrogateescape")
    drawn = {id: SQUARE}
    quality.write_answers({id: "random"}, ["drawn"], SQUARE[None] > 0, SQUARE[None] / 9, drawn, tmp_path)
    assert read_answers_of(tmp_path)["ids"] == [id]
    assert read_csv(tmp_path / "answers.csv")[0]["id"] == id


def test_the_change_of_the_masks_is_the_dice_of_consecutive_predictions(tmp_path):
    networks = iter([SQUARE, LINE, LINE])
    estimates = Quality(
        np.array(list("ABCDEF")), np.arange(1, 6), 1, None, lambda at: np.stack([next(networks)] * len(at))
    )
    pool = a_pool()
    write_csv(tmp_path / "queries.csv", ["id", "group"], [])
    for iteration, stability in (1, "0.500000"), (2, "1.000000"):
        means = estimates.before_training(pool, pool.unlabelled, iteration, tmp_path, tmp_path)
        estimates.after_training(iteration, means, tmp_path)
        (row,) = read_csv(tmp_path / "quality.csv")
        assert (row["iteration"], row["answers"], row["stability"]) == (str(iteration), "0", stability)


def test_the_images_watched_are_of_the_pool_and_depend_on_the_seed_alone():
    pool = np.arange(50, 1050)
    one, same, other = (Quality([], pool, seed, None, None).watched for seed in (1, 1, 2))
    assert len(set(one)) == quality.WATCHED
    assert set(one) <= set(pool)
    np.testing.assert_array_equal(one, same)
    assert set(one) != set(other)
    assert len(Quality([], pool[:7], 1, None, None).watched) == 3  # a third: the pool of a demo is small


def test_masks_are_stable_after_some_iterations_in_a_row():
    low, high = quality.STABLE - 0.001, quality.STABLE
    assert is_stable([low, high, high, high])
    assert not is_stable([high, high])
    assert not is_stable([high, high, low, high, high])
    assert not is_stable([high, None, high])


def test_the_sentence():
    row = {"stability": "0.979000", "stable": "0", "estimate": ""}
    assert sentence(row) == "the masks of the pool changed by 2.1 % (Dice 0.979)"
    assert sentence({**row, "stable": "1"}).endswith("(Dice 0.979): more annotations will change little")
    assert sentence({"stability": "", "stable": "", "estimate": ""}) == ""
    audited = {"estimate": "0.861", "estimate_low": "0.829", "estimate_high": "0.893", "stable": "1"}
    assert sentence({**row, **audited}) == (
        "the masks of the pool changed by 2.1 % (Dice 0.979), estimated Dice 0.86 (0.83 to 0.89): more annotations "
        "will change little"
    )


# ------------------------------------------------------------------------------------------------------ a whole run


def test_quality_csv_has_a_row_per_iteration(a_run):
    rows = read_csv(a_run / "quality.csv")
    assert ",".join(rows[0]) == (
        "iteration,answers,dice,jaccard,dice_no_detection,jaccard_no_detection,dice_most_uncertain,"
        "jaccard_most_uncertain,dice_random,jaccard_random,stability,stable,estimate,estimate_low,estimate_high"
    )
    assert [row["iteration"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["answers"] for row in rows] == ["", "4", "4", "4"]
    assert set(rows[0].values()) == {"0", ""}
    assert all(0 <= float(row["stability"]) <= 1 for row in rows[1:])
    for k, row in enumerate(rows[1:], 1):
        answers = read_csv(a_run / f"iteration_0{k}" / "answers.csv")
        assert float(row["dice"]) == pytest.approx(np.mean([float(answer["dice"]) for answer in answers]), abs=1e-6)
        of_random = [float(answer["jaccard"]) for answer in answers if answer["group"] == "random"]
        assert float(row["jaccard_random"]) == pytest.approx(np.mean(of_random), abs=1e-6)


def test_the_dice_of_an_answer_is_that_of_its_score(a_run):
    """The simulated oracle answers with the true masks, against which the scoring has measured the same prediction."""
    for k in 1, 2, 3:
        scored = {row["id"]: row["dice"] for row in read_csv(a_run / f"iteration_0{k}" / "scores.csv")}
        asked = [row for row in read_csv(a_run / f"iteration_0{k}" / "queries.csv") if row["group"] != "pseudo"]
        answers = read_csv(a_run / f"iteration_0{k}" / "answers.csv")
        assert [(row["id"], row["group"]) for row in answers] == [(row["id"], row["group"]) for row in asked]
        for row in answers:
            assert float(row["dice"]) == pytest.approx(float(scored[row["id"]]), abs=2e-3)


def test_stability_is_that_of_the_weights_of_two_iterations(a_run, data_file):
    def masks(k):
        model, settings = load_unet(a_run / f"iteration_0{k}" / "model.weights.h5")
        inputs = (images - settings["mean"][0]) / settings["std"][0]
        return model.predict(inputs.astype(np.float32), verbose=0)[..., 0] > 0.5

    with Dataset(data_file) as dataset:
        images = dataset.images(Quality([], split(dataset, 9, 40, 0).pool, 1, None, None).watched)
    expected = segmentation_metrics(masks(1), masks(2))["dice"].mean()
    assert float(read_csv(a_run / "quality.csv")[2]["stability"]) == pytest.approx(expected, abs=1e-3)


def test_a_killed_run_has_the_same_quality(data_file, a_run, tmp_path):
    run, arguments = tmp_path / "r", ["--data", data_file, *OPTIONS.split()]
    for at in 60, 75, 0:
        process = start(run, *([] if (run / "config.json").exists() else arguments), at=at)
        process.communicate()
    assert process.returncode == 0
    assert content(run).keys() == content(a_run).keys()
    for name in content(run):
        if name.endswith((".csv", ".npz", ".html")):
            assert content(run)[name] == content(a_run)[name], name


def test_a_run_of_an_earlier_version_goes_on(data_file, a_run, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(a_run, run)
    shutil.rmtree(run / "iteration_03")
    for path in (*run.rglob("quality.csv"), *run.rglob("answers.*"), run / "report.html"):
        path.unlink()
    finish(start(run))
    rows, whole = read_csv(run / "quality.csv"), read_csv(a_run / "quality.csv")
    assert [set(row.values()) for row in rows[:3]] == [{str(k), ""} for k in range(3)]
    assert rows[3] == {**whole[3], "stable": "0"}
    assert (run / "report.html").exists()


@pytest.mark.parametrize("options", ["--query uniform --pseudo-first 0 --pseudo-step 0", "--query none", "--pool 4"])
def test_whatever_the_queries(data_file, tmp_path, monkeypatch, options):
    arguments = ["--run", tmp_path / "r", "--data", data_file, *OPTIONS.split(), "--iterations", 1, *options.split()]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    train.main()
    row = read_csv(tmp_path / "r" / "quality.csv")[1]
    assert row["answers"] == ("0" if "none" in options else "4")
    assert row["stability"] != ""
    assert (tmp_path / "r" / "report.html").exists()


def test_without_iterations_the_pool_is_not_watched(data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "predict", lambda *_: pytest.fail("predicted"))
    monkeypatch.setattr(Trainer, "warn_if_collapsed", lambda *_: None)
    monkeypatch.setattr(train, "draw_overview", lambda *_: None)
    arguments = ["--run", tmp_path / "r", "--data", data_file, *OPTIONS.split(), "--iterations", 0, "--pool", 0]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    train.main()
    assert read_quality(tmp_path / "r", 1)[0]["stability"] == ""


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "iteration_00").mkdir()
    (tmp_path / "iteration_00" / "quality.csv").write_text("iteration,stability\n0,x\n")
    with pytest.raises(UserError, match=r"iteration_00/quality\.csv: not as"):
        write_quality(tmp_path, 1)
