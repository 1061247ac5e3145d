"""How good the network's masks of the whole pool are, estimated from the answers, without test images [ours].

Nothing here knows networks or people.
"""

import json
from typing import NamedTuple

import numpy as np

import ceal
from run_folder import read_selection
from strategies import BY_CHANCE
from utils import derived_seed, read_csv

ESTIMATE = ["estimate", "estimate_low", "estimate_high"]  # columns of quality.csv


def draw_audit(candidates, config, iteration):
    """The images of --audit: that many of `candidates`, an int array, uniformly at random."""
    rng = np.random.default_rng(derived_seed(config.seed, iteration, "audit"))
    return np.sort(rng.choice(candidates, min(config.audit, len(candidates)), replace=False))


class Scored(NamedTuple):
    """The pool of an iteration, and what is known of its images."""

    scores: np.ndarray  # float64 (n,), of every image
    answered: dict  # of group to (positions in `scores`, int (m,); Dice of proposal and answer, float64 (m,))


def estimate_pool_dice(pools):
    """Estimate the mean Dice of the network's masks of the last pool, with a 95 % interval. pools: a list of Scored,
    from the first iteration on. Returns (estimate, low, high); None if fewer than two images were audited.

    A difference estimator, as in active testing (Kossen et al., ICML 2021): the Dice that earlier answers predict from
    the rank of the score, averaged over the pool, plus the mean error of this prediction on images that were drawn with
    a known chance. These are the group `audit`, drawn uniformly from the pool, and the group `random`, drawn uniformly
    from a range of scores: so the errors are averaged within this range and outside of it, and then over both by their
    shares of the pool. The variance of the errors in each of these strata is that of all iterations after the first."""
    from scipy.stats import rankdata  # here, because it takes half a second to import

    known, spread, result = [], ([], [], []), None
    for pool in pools:
        ranks = rankdata(pool.scores) / len(pool.scores)
        predicted = predict_dice(ranks, known)
        errors = audited_errors(pool, predicted)
        for before, (_, found) in zip(spread, errors):
            before.append(found - found.mean() if len(found) else found)
        parts = [(*found, before[1:] or before) for found, before in zip(errors, spread)]
        # Too few images in a stratum: without strata.
        result = add_up(predicted.mean(), parts[:2], len(ranks)) or add_up(predicted.mean(), parts[2:], len(ranks))
        pairs = [(ranks[at], dice) for at, dice in pool.answered.values()]
        known += [np.concatenate(column) for column in zip(*pairs)]
    return result


def predict_dice(ranks, known):
    """The Dice at these ranks by an isotonic regression on earlier answers: the higher the score, the lower the Dice.
    known: a list of ranks, Dice, ranks, Dice, ... Without any, the prediction is 0."""
    if not known or not len(at := np.concatenate(known[::2])):
        return np.zeros(len(ranks))
    from scipy.optimize import isotonic_regression  # here, as above

    order = np.argsort(at, kind="stable")
    fitted = isotonic_regression(np.concatenate(known[1::2])[order], increasing=False).x
    return np.interp(ranks, at[order], fitted)


def audited_errors(pool, predicted):
    """The errors of the prediction on audited images within the range of scores of the group `random`, outside of it,
    and in the whole pool, there of `audit` alone: three pairs of (share of the pool, errors)."""
    low, high = sorted(ceal.random_range(*ceal.histogram(pool.scores)[2:]))
    within = (pool.scores >= low) & (pool.scores < high)
    parts = (within, ("audit", "random")), (~within, ("audit",)), (np.full(len(within), True), ("audit",))
    pairs = []
    for part, groups in parts:
        answered = [pool.answered[group] for group in groups if group in pool.answered]
        errors = [(dice - predicted[at])[part[at]] for at, dice in answered]
        pairs.append((part.mean(), np.concatenate([*errors, np.zeros(0)])))
    return pairs


def add_up(predicted, strata, size):
    """The difference estimate and its interval. strata: tuples of (share, errors, deviations of the errors from their
    mean in several iterations); size: of the pool."""
    from scipy.stats import t as student  # here, as above

    estimate, variance, freedom = predicted, 0.0, []
    for share, errors, deviations in strata:
        if not share:
            continue
        freedom.append(sum(len(some) - 1 for some in deviations if len(some)))
        if not len(errors) or freedom[-1] < 1:
            return None
        estimate += share * errors.mean()
        squares = sum(np.sum(some**2) for some in deviations) / freedom[-1]
        variance += share**2 * squares / len(errors) * max(0.0, 1 - len(errors) / (share * size))
    half = student.ppf(0.975, min(freedom)) * np.sqrt(variance)
    return float(estimate), float(estimate - half), float(estimate + half)


def estimates(run, iterations):
    """The columns ESTIMATE of each of this number of finished iterations, a list of dict of str: empty where nothing
    was audited."""
    rows, pools, by_chance = [], [], drawn_by_chance(run)
    for iteration in range(iterations):
        folder, row = run / f"iteration_{iteration:02d}", dict.fromkeys(ESTIMATE, "")
        if (folder / "scores.csv").exists() and (folder / "answers.csv").exists():
            pools.append(read_scored(folder, by_chance))
            if "audit" in pools[-1].answered and (found := estimate_pool_dice(pools)):
                row = dict(zip(ESTIMATE, (f"{min(max(value, 0), 1):.6f}" for value in found)))
        rows.append(row)
    return rows


def drawn_by_chance(run):
    """Whether the group `random` of a run is drawn uniformly from its range of scores."""
    config = run / "config.json"
    return not config.exists() or json.loads(config.read_text()).get("query", "paper") in BY_CHANCE


def read_scored(folder, by_chance=True):
    """The Scored of an iteration's folder. by_chance: as from `drawn_by_chance`; else that group says nothing about the
    images that were not asked for, and is called `chosen`."""
    ids, scores, *_ = read_selection(folder)
    place, answered = {id: n for n, id in enumerate(ids)}, {}
    for row in read_csv(folder / "answers.csv"):
        if row["id"] in place:
            group = "chosen" if row["group"] == "random" and not by_chance else row["group"]
            answered.setdefault(group, []).append((place[row["id"]], float(row["dice"])))
    columns = {group: tuple(map(np.array, zip(*pairs))) for group, pairs in answered.items()}
    return Scored(scores, columns)
