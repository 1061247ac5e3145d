"""The query strategies. A new one is a function and an entry in STRATEGIES; --query and reproduce.py's arms follow.

A strategy is a function (scores, rng, config) -> dict of group (no_detection, most_uncertain, random) to positions in
`scores`. Nothing here knows files, people or networks.
"""

from typing import NamedTuple

import numpy as np

import ceal


def paper(scores, rng, config):
    """The paper's three groups: lowest scores, most uncertain, random."""
    counts = config.no_detection, config.most_uncertain, config.random
    return ceal.select_queries(scores, rng, *counts, config.no_detection_rule)


def uniform(scores, rng, config):
    """Images at random from the whole pool, each as likely."""
    return {"random": rng.choice(len(scores), min(config.asked, len(scores)), replace=False)}


def power(scores, rng, config):
    """Images at random from the whole pool, in proportion to the score.

    Ours, after PowerBALD (Kirsch et al., TMLR 2023). Scores of 0 come last, at random.
    """
    scores = np.asarray(scores, np.float64)
    if not len(scores):
        return {"random": np.array([], int)}
    weights = np.maximum(scores, (1e-12 * scores.max()) or 1)  # equal weights if all scores are 0
    count = min(config.asked, len(scores))
    return {"random": rng.choice(len(scores), count, replace=False, p=weights / weights.sum())}


def no_queries(scores, rng, config):
    """No images: training goes on with the initial labels."""
    return {"random": np.array([], int)}


class Strategy(NamedTuple):
    select: object  # (scores, rng, config) -> dict of group to positions; scores: float64 (N,), those of the pool
    scored: bool = True  # False: it does not look at the scores, and the pool is not scored for it


STRATEGIES = {
    "paper": Strategy(paper),
    "uniform": Strategy(uniform, scored=False),
    "power": Strategy(power),
    "none": Strategy(no_queries, scored=False),
}
