"""audit.py: the images of --audit, and the estimate of the pool's Dice with its interval."""

import numpy as np
import pytest
from conftest import write_blobs
from scipy.stats import rankdata

import audit
import ceal
import train
from audit import Scored, draw_audit, estimate_pool_dice, predict_dice
from config import Config
from data import Dataset
from utils import read_csv, write_csv


def made_pools(rng, count=6, size=400):
    """Pools whose Dice falls with the score, as on real images: (scores, Dice), float64 (n,) each."""
    for _ in range(count):
        scores = rng.gamma(1.0, 3.0, size)
        spread = 0.05 + 0.25 * rankdata(scores) / size
        yield scores, np.clip(0.95 - 0.03 * scores + rng.normal(0, spread), 0, 1)


def asked(rng, scores, dice, audited):
    """What is asked from such a pool: a Scored with `audit`, `random` and `most_uncertain`."""
    audit = rng.choice(len(scores), audited, replace=False)
    rest = np.setdiff1d(np.arange(len(scores)), audit)
    groups = ceal.select_queries(scores[rest], rng, 0, 5, 8)
    positions = {"audit": audit, **{group: rest[selected] for group, selected in groups.items() if len(selected)}}
    return Scored(scores, {group: (at, dice[at]) for group, at in positions.items()})


def test_the_intervals_cover_the_truth():
    rng, covered, errors = np.random.default_rng(1), [], []
    for _ in range(60):
        pools = []
        for scores, dice in made_pools(rng):
            pools.append(asked(rng, scores, dice, 10))
            estimate, low, high = estimate_pool_dice(pools)
            covered.append(low <= dice.mean() <= high)
            errors.append(estimate - dice.mean())
    assert np.mean(covered) > 0.9
    assert abs(np.mean(errors)) < 0.01


def test_it_is_more_precise_than_the_audited_images_alone():
    rng, mine, alone = np.random.default_rng(2), [], []
    for _ in range(60):
        pools = []
        for scores, dice in made_pools(rng):
            pools.append(asked(rng, scores, dice, 10))
        mine.append(estimate_pool_dice(pools)[0] - dice.mean())
        alone.append(pools[-1].answered["audit"][1].mean() - dice.mean())
    assert np.std(mine) < 0.8 * np.std(alone)


def test_a_pool_that_is_audited_completely_is_known_exactly():
    scores, dice = next(made_pools(np.random.default_rng(3), size=40))
    everything = np.arange(40)
    estimate, low, high = estimate_pool_dice([Scored(scores, {"audit": (everything, dice)})])
    assert (estimate, low, high) == pytest.approx((dice.mean(),) * 3)


def test_queries_that_are_not_drawn_by_chance_do_not_move_the_estimate_of_their_own_iteration():
    scores, dice = next(made_pools(np.random.default_rng(4)))
    at = np.random.default_rng(5).choice(400, 10, replace=False)
    first = estimate_pool_dice([Scored(scores, {"audit": (at, dice[at])})])
    worst = np.argsort(scores)[-20:]
    second = estimate_pool_dice([Scored(scores, {"audit": (at, dice[at]), "most_uncertain": (worst, np.zeros(20))})])
    assert first == second


def test_the_group_random_counts_only_where_it_is_drawn_by_chance(tmp_path):
    write_csv(tmp_path / "iteration_01" / "scores.csv", ["id", "uncertainty", "dice"], [("a", 1, ""), ("b", 2, "")])
    write_csv(tmp_path / "iteration_01" / "queries.csv", ["id", "group"], [("a", "random"), ("b", "audit")])
    answers = [("a", "random", 0.5, 0.4), ("b", "audit", 0.7, 0.6)]
    write_csv(tmp_path / "iteration_01" / "answers.csv", ["id", "group", "dice", "jaccard"], answers)
    for query, group in ("paper", "random"), ("power", "chosen"):
        (tmp_path / "config.json").write_text(f'{{"query": "{query}"}}')
        scored = audit.read_scored(tmp_path / "iteration_01", audit.drawn_by_chance(tmp_path))
        assert {name: dice.tolist() for name, (_, dice) in scored.answered.items()} == {group: [0.5], "audit": [0.7]}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_audited_images_are_too_few(count):
    scores, dice = next(made_pools(np.random.default_rng(6)))
    assert estimate_pool_dice([Scored(scores, {"audit": (np.arange(count), dice[:count])})]) is None


def test_equal_scores_are_no_obstacle():
    dice, at = np.linspace(0, 1, 50), np.arange(0, 50, 5)
    pool = Scored(np.zeros(50), {"audit": (at, dice[at])})
    estimate, low, high = estimate_pool_dice([pool, pool])
    assert low < dice.mean() < high
    assert estimate == pytest.approx(dice[at].mean())


def test_the_prediction_falls_with_the_score():
    known = [np.array([0.9, 0.1, 0.5]), np.array([0.2, 0.9, 0.6]), np.array([0.3]), np.array([0.5])]
    found = predict_dice(np.array([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]), known)
    np.testing.assert_allclose(found, [0.9, 0.9, 0.55, 0.55, 0.375, 0.2])
    assert (predict_dice(np.array([0.2, 0.4]), []) == 0).all()


def test_the_audited_images_depend_on_seed_and_iteration_alone():
    candidates, config = np.arange(100, 200), Config(audit=12)
    first = draw_audit(candidates, config, 3)
    assert len(set(first)) == 12
    assert set(first) <= set(candidates)
    np.testing.assert_array_equal(first, draw_audit(candidates, config, 3))
    assert set(first) != set(draw_audit(candidates, config, 4))
    assert len(draw_audit(candidates[:5], config, 3)) == 5
    assert len(draw_audit(candidates, Config(), 3)) == 0


def test_every_image_is_audited_equally_often():
    counts = np.zeros(20)
    for seed in range(2000):
        counts[draw_audit(np.arange(20), Config(audit=5, seed=seed), 1)] += 1
    assert counts / 2000 == pytest.approx(0.25, abs=0.04)


def test_folders_without_answers_or_scores_have_no_estimate(tmp_path):
    (tmp_path / "iteration_00").mkdir()
    assert audit.estimates(tmp_path, 2) == [dict.fromkeys(audit.ESTIMATE, "")] * 2


def test_a_run_asks_for_them_and_writes_the_estimate(tmp_path, monkeypatch, capsys):
    """The audited images are asked for beside the others, trained on, and never queried otherwise."""
    data, run = write_blobs(tmp_path / "blobs.h5", 60, 48, 64), tmp_path / "run"
    options = (
        "--filters 2 --batch-size 4 --passes 2 --initial 8 --pool 40 --test 6 --initial-epochs 4 --active-epochs 2 "
        "--no-detection 2 --most-uncertain 2 --random 3 --iterations 2 --audit 4 --learning-rate 0.001"
    )
    monkeypatch.setattr("sys.argv", f"train.py --data {data} --run {run} {options}".split())
    train.main()
    history = read_csv(run / "history.csv")
    assert [row["annotations"] for row in history] == ["8", "19", "30"]
    rows = read_csv(run / "quality.csv")
    assert rows[0]["estimate"] == ""
    with Dataset(data) as dataset:
        place = {id: n for n, id in enumerate(dataset.ids)}
    for k in 1, 2:
        folder = run / f"iteration_{k:02d}"
        queries = {row["id"]: row["group"] for row in read_csv(folder / "queries.csv") if row["group"] != "pseudo"}
        candidates = np.array([place[row["id"]] for row in read_csv(folder / "scores.csv")])
        expected = draw_audit(np.arange(len(candidates)), Config(audit=4), k)
        assert {place[id] for id, group in queries.items() if group == "audit"} == set(candidates[expected])
        assert len(queries) == 11
        dice = [float(row["dice"]) for row in read_csv(folder / "scores.csv")]
        low, estimate, high = (float(rows[k][f"estimate{end}"]) for end in ("_low", "", "_high"))
        assert 0 <= low <= estimate <= high <= 1
        assert abs(estimate - np.mean(dice)) < 0.4
    assert capsys.readouterr().out.count(", estimated Dice ") == 2
