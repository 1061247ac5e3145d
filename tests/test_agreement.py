"""agreement.py: how alike people draw the images that a strategy asks for."""

import json

import numpy as np
import pytest

import agreement
from utils import UserError, write_csv

# Of ten images t is for test; people agree on a, b, c and d but not on e to h. x is not known, z is elsewhere.
PEOPLE = {"a": 0.9, "b": 0.8, "c": 0.9, "d": 0.8, "e": 0.1, "f": 0.3, "g": 0.2, "h": 0.4, "t": 0.5, "z": 1.0}
QUERIES = [(1, "e", "most_uncertain"), (1, "a", "pseudo"), (1, "x", "random"), (2, "f", "most_uncertain")]
QUERIES += [(2, "b", "random")]


@pytest.fixture
def records(tmp_path):
    """The records of two seeds of `ceal` with the same queries, one of `full`, and the people's csv file."""
    for name in "scarce-ceal-1", "scarce-ceal-2", "full-1":
        folder = tmp_path / "out" / "records" / name
        write_csv(folder / "test_dice.csv", ["id", "iteration_00"], [["t", 0.5]])
        (folder / "config.json").write_text('{"validation": 0}')
        write_csv(folder / "queries.csv", ["iteration", "id", "group"], QUERIES if "ceal" in name else [])
        if "ceal" in name:
            maps = {name: np.ones((1, 9), np.float32) for name in ("score", "dice")}
            np.savez(folder / "pool_images.npz", ids=list("abcdefghx"), iterations=[1], **maps)
    write_csv(tmp_path / "people.csv", ["id", "pairs", "dice"], [(id, 1, dice) for id, dice in PEOPLE.items()])
    return tmp_path


def test_the_agreement_over_what_was_asked_for_is_the_mean_by_hand(records, capsys):
    agreement.report(records / "out", agreement.read_agreement(records / "people.csv"))
    rows = json.loads((records / "out" / "agreement.json").read_text())
    found = {(row["group"], row["iteration"]): row for row in rows}
    assert all((row["regime"], row["arm"], row["seeds"]) == ("scarce", "ceal", 2) for row in rows)
    assert found["all", "1 to 2"]["agreement"] == pytest.approx((0.1 + 0.3 + 0.8) / 3)
    assert found["all", "1 to 2"]["images"] == 6  # three in each seed
    assert found["most_uncertain", "1 to 2"]["agreement"] == pytest.approx(0.2)
    assert found["pseudo", "1 to 2"]["agreement"] == pytest.approx(0.9)
    assert found["all", 1]["agreement"] == pytest.approx(0.1)
    assert found["all", 1]["less_others"][0] == pytest.approx(0.1 - 4.4 / 8)  # of all in the pool
    assert found["all", 2]["less_others"][0] == pytest.approx(0.55 - 4.3 / 7)  # without e, which was asked for before
    assert "| scarce | ceal | 2 | most uncertain | 1 to 2 | 4 | 0.2000 |" in capsys.readouterr().out


def test_a_run_without_scores_has_the_pool_of_one_with_the_same_first_labels(records):
    for name, settings in ("scarce-random-1", {}), ("paper-random-1", {"initial": 9}):
        folder = records / "out" / "records" / name
        write_csv(folder / "test_dice.csv", ["id", "iteration_00"], [["t", 0.5]])
        (folder / "config.json").write_text(json.dumps({"validation": 0, **settings}))
        write_csv(folder / "queries.csv", ["iteration", "id", "group"], [(1, "b", "random"), (2, "c", "random")])
    agreement.report(records / "out", agreement.read_agreement(records / "people.csv"))
    rows = json.loads((records / "out" / "agreement.json").read_text())
    (found,) = (row for row in rows if row["arm"] == "random" and row["group"] == "all" and row["iteration"] == 1)
    assert (found["regime"], found["less_others"][0]) == ("scarce", pytest.approx(0.8 - 4.4 / 8))


def test_runs_that_hold_out_images_do_not_count_their_test_images(records):
    (records / "out" / "records" / "scarce-ceal-2" / "config.json").write_text('{"validation": 8}')
    with pytest.raises(UserError, match="scarce-ceal-2: made with --validation"):
        agreement.report(records / "out", PEOPLE)


def test_the_interval_is_that_of_independent_images():
    rng = np.random.default_rng(0)
    dice, asked = rng.random(400), rng.random(400) < 0.5
    mean, (less, low, high) = agreement.difference(asked[None].astype(int), (~asked)[None].astype(int), dice)
    assert (mean, less) == pytest.approx((dice[asked].mean(), dice[asked].mean() - dice[~asked].mean()))
    half = 1.96 * np.sqrt(dice[asked].var() / asked.sum() + dice[~asked].var() / (~asked).sum())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("id,jaccard\na,0.5\n", "not a csv file with the columns id and dice"),
        ("id,dice\na,much\n", "not a csv file with the columns id and dice"),
        ("id,dice\n", "numbers from 0 to 1 in at least one row"),
        ("id,dice\na,95\n", "numbers from 0 to 1"),
    ],
)
def test_a_file_that_is_not_of_peoples_agreement_is_named(tmp_path, content, said):
    path = tmp_path / "people.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"people.csv.*{said}"):
        agreement.read_agreement(path)


def test_a_file_of_other_images_is_named(records):
    with pytest.raises(UserError, match="asked for none of the csv file's images; are their ids"):
        agreement.report(records / "out", {"z": 1.0})
    with pytest.raises(UserError, match="asked for none"):
        agreement.report(records / "out", {"c": 1.0})


def test_without_queries_there_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"no record with scores; do runs with reproduce\.py first"):
        agreement.report(tmp_path, PEOPLE)
