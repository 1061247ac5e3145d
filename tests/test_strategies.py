"""strategies.py: what each strategy selects, and that a new one needs only an entry in the table."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import ceal
from config import Config
from experiment import ARMS
from strategies import STRATEGIES, no_queries, paper, power, select, strata, typical, undisputed, uniform


def asking(count):
    """The part of a Config that a strategy uses."""
    return SimpleNamespace(asked=count)


def test_uniform_queries_are_of_the_whole_pool_and_none_is_named_twice():
    chosen = [uniform(np.zeros(40), np.random.default_rng(seed), asking(10))["random"] for seed in range(200)]
    assert all(len(set(positions)) == 10 for positions in chosen)
    assert np.bincount(np.concatenate(chosen), minlength=40).min() > 20  # 50 by chance
    assert sorted(uniform(np.zeros(7), np.random.default_rng(0), asking(10))["random"]) == list(range(7))


def test_power_queries_are_as_likely_as_their_scores():
    scores = np.array([0.0, 1, 1, 2, 6, 0])
    first = [power(scores, np.random.default_rng(seed), asking(1))["random"][0] for seed in range(2000)]
    np.testing.assert_allclose(np.bincount(first, minlength=6) / 2000, scores / 10, atol=0.03)
    for seed in range(20):
        chosen = power(scores, np.random.default_rng(seed), asking(5))["random"]
        assert {1, 2, 3, 4} < set(chosen)
        assert len(set(chosen)) == 5
    assert sorted(power(scores, np.random.default_rng(0), asking(10))["random"]) == list(range(6))
    assert len(power(np.zeros(4), np.random.default_rng(0), asking(2))["random"]) == 2
    assert len(power([], np.random.default_rng(0), asking(2))["random"]) == 0


def test_the_papers_strategy_asks_for_the_three_groups_of_the_config():
    scores, config = np.random.default_rng(0).random(200), Config(no_detection=3, most_uncertain=4, random=5)
    groups = paper(scores, np.random.default_rng(1), config)
    expected = ceal.select_queries(scores, np.random.default_rng(1), 3, 4, 5)
    assert {group: positions.tolist() for group, positions in groups.items()} == {
        group: positions.tolist() for group, positions in expected.items()
    }


def test_undisputed_prefers_what_people_may_draw_differently_and_leaves_out_what_they_do():
    agreement, config = np.repeat([0.5, 0.75, 0.95], 200), Config(least_agreement=0.7)
    rng = np.random.default_rng(1)
    chosen = np.concatenate([undisputed(np.zeros(600), rng, config, agreement)["random"] for _ in range(40)])
    count = np.bincount(chosen // 200, minlength=3)
    assert count[0] == 0
    assert 4 < count[1] / count[2] < 6  # 0.25 to 0.05
    few = np.linspace(0, 1, 60)
    assert set(undisputed(np.zeros(60), rng, config, few)["random"]) == set(range(25, 60))  # 18 are not below 0.7


def test_strata_are_of_the_predicted_size_and_share_the_queries():
    """Ten empty predictions, then three sizes of lesions, thirty of each; a stratum that is too small is emptied."""
    sizes, config = np.repeat([0, 5, 50, 500], [10, 30, 30, 30]), SimpleNamespace(asked=20, iterations=9)
    scores = np.random.default_rng(0).random(100) * sizes
    groups = strata(scores, np.random.default_rng(1), config, sizes, 1)
    chosen = np.concatenate(list(groups.values()))
    assert [int((sizes[chosen] == size).sum()) for size in (0, 5, 50, 500)] == [5, 5, 5, 5]
    assert sizes[groups["no_detection"]].tolist() == [0] * 5
    config.asked = 60
    chosen = np.concatenate(list(strata(scores, np.random.default_rng(1), config, sizes, 1).values()))
    counts = [int((sizes[chosen] == size).sum()) for size in (0, 5, 50, 500)]
    assert counts[0] == 10
    assert sum(counts) == 60
    assert max(counts[1:]) - min(counts[1:]) <= 1


def test_the_noise_of_strata_decays():
    """Of lesions of one size, later iterations ask for the highest scores, the first one less strictly."""
    scores, sizes, config = np.linspace(0.5, 1.5, 300), np.full(300, 9), SimpleNamespace(asked=30, iterations=9)

    def mean_rank(iteration):
        found = [strata(scores, np.random.default_rng(seed), config, sizes, iteration) for seed in range(40)]
        return np.mean([np.concatenate(list(groups.values())).mean() for groups in found])

    ranks = [mean_rank(iteration) for iteration in (1, 5, 9)]
    assert 150 < ranks[0] < ranks[1] < ranks[2]
    assert ranks[0] < 220
    assert ranks[2] > 250


def test_typical_images_are_in_the_middle_of_each_group_of_alike_images():
    """Three clouds and one stray point: the first three are one near the middle of each cloud."""
    rng = np.random.default_rng(0)
    middles = np.array([[0, 0], [10, 0], [0, 10]])
    points = np.concatenate([*(rng.normal(middle, 1, (40, 2)) for middle in middles), [[40, 40]]])
    for seed in range(5):
        chosen = typical(points, 4, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 4
        assert 120 not in chosen
        assert {int(position) // 40 for position in chosen} == {0, 1, 2}
        assert all(np.hypot(*(points[n] - middles[n // 40])) < 1.2 for n in chosen[:3])
    assert sorted(typical(points, 200, rng)) == list(range(121))
    assert len(typical(np.zeros((50, 2)), 7, rng)) == 7


def test_without_queries_nothing_is_selected_and_nothing_is_drawn():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert no_queries(np.zeros(9), rng, asking(0))["random"].tolist() == []
    assert rng.bit_generator.state == before


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("count", [0, 3, 50])
def test_every_strategy_selects_each_position_once_and_no_more_than_there_are(name, count):
    config, seen = Config(query=name), {"sizes": np.arange(count) // 2, "agreement": np.linspace(0, 1, count)}
    groups = select(np.linspace(0, 1, count), np.random.default_rng(0), config, {**seen, "iteration": 1})
    positions = np.concatenate(list(groups.values()))
    assert len(set(positions.tolist())) == len(positions) == min(config.asked, count)
    assert set(groups) <= {"no_detection", "most_uncertain", "random"}


def test_every_strategy_is_an_arm_of_the_experiment():
    assert {changes.get("query", "paper") for changes in ARMS.values()} == set(STRATEGIES)


NEW_STRATEGY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import strategies
def highest(scores, rng, config, agreement, iteration):
    'The highest scores.'
    assert len(agreement) == len(scores) and iteration == 1
    return {"most_uncertain": scores.argsort()[::-1][: config.asked]}
strategies.STRATEGIES["highest"] = strategies.Strategy(highest, sees=("agreement", "iteration"))
import experiment, train, utils
assert experiment.ARMS["highest"] == {"query": "highest"} and "highest" in experiment.STYLES
utils.run_command(train.main)
"""


@pytest.mark.slow
def test_a_new_strategy_takes_one_entry_in_the_table(tmp_path):
    options = "--preset demo --run r --query highest --iterations 1 --initial 8 --pool 20 --test 4 --initial-epochs 1"
    command = [sys.executable, "-c", NEW_STRATEGY, str(ROOT), *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "r" / "iteration_01" / "scores.csv").read_text().splitlines()[1:]
    by_score = sorted(lines, key=lambda line: -float(line.split(",")[1]))
    queried = (tmp_path / "r" / "iteration_01" / "queries.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in queried} == {line.split(",")[0] for line in by_score[:14]}
    help = subprocess.run([*command[:4], "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "highest: The highest scores." in " ".join(help.split())
