"""The query strategies. A new one is a function and an entry in STRATEGIES; --query and reproduce.py's arms follow.

A strategy is a function (scores, rng, config) -> dict of group (no_detection, most_uncertain, random) to positions in
`scores`. It also gets, by name, what its entry lists as `sees`. Nothing here knows files, people or networks.
"""

import warnings
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


def undisputed(scores, rng, config, agreement):
    """Images at random, the more likely the less people would agree, without those on which they probably disagree.

    Ours. In proportion to 1 - expected agreement (utils.expected_agreement), which unlike the score does not grow with
    the lesion; without the images below --least-agreement. Should too few remain, those closest to it are added."""
    agreement = np.asarray(agreement, np.float64)
    allowed = np.flatnonzero(agreement >= config.least_agreement)
    if len(allowed) < config.asked:
        allowed = np.argsort(-agreement, kind="stable")[: config.asked]
    return {"random": allowed[power(1 - agreement[allowed], rng, config)["random"]]}


def no_queries(scores, rng, config):
    """No images: training goes on with the initial labels."""
    return {"random": np.array([], int)}


def strata(scores, rng, config, sizes, iteration):
    """As many images of each predicted size (none, small, middle, large), by score with noise that decays.

    Ours, after ClaSP PE (Lueth et al., arXiv 2601.13677), which does so for each class. Three equal parts of the pool's
    lesions are small, middle and large. Within each stratum the images with the highest log(score) + noise are taken;
    the noise is Gumbel's, divided by a number that grows from 1 in the first iteration to 10 in the last. A stratum
    that is too small leaves its places to the others. sizes: predicted lesion pixels (N,)."""
    scores, sizes = np.asarray(scores, np.float64), np.asarray(sizes)
    lesions = np.sort(sizes[sizes > 0])
    stratum = np.where(sizes > 0, 1 + np.searchsorted(lesions, sizes, side="right") * 3 // (len(lesions) + 1), 0)
    decay = 10 ** ((iteration - 1) / max(config.iterations - 1, 1))
    tiny = np.finfo(np.float64).tiny  # all images without a lesion score 0: the noise alone decides
    order = np.argsort(-(np.log(np.maximum(scores, tiny)) + rng.gumbel(size=len(scores)) / decay))
    turn = np.empty(len(scores), int)  # an image's place in its stratum: the strata take turns
    for number in range(4):
        mine = order[stratum[order] == number]
        turn[mine] = np.arange(len(mine))
    chosen = np.lexsort((rng.random(len(scores)), turn))[: config.asked]
    empty = stratum[chosen] == 0
    return {"no_detection": chosen[empty], "most_uncertain": chosen[~empty]}


class Strategy(NamedTuple):
    select: object  # (scores, rng, config, **sees) -> dict of group to positions; scores: float64 (N,), of the pool
    scored: bool = True  # False: it does not look at the scores, and the pool is not scored for it
    sees: tuple = ()  # what else it gets by name: `sizes`, `agreement` (trainer.Scored); `iteration`, from 1 on


STRATEGIES = {
    "paper": Strategy(paper),
    "uniform": Strategy(uniform, scored=False),
    "power": Strategy(power),
    "undisputed": Strategy(undisputed, sees=("agreement",)),
    "strata": Strategy(strata, sees=("sizes", "iteration")),
    "none": Strategy(no_queries, scored=False),
}
BY_CHANCE = "paper", "uniform"  # their group `random` is drawn uniformly, from a range of scores or from the pool


def select(scores, rng, config, known):
    """The groups of the Config's strategy. known: a dict of all that a strategy may list as `sees`."""
    strategy = STRATEGIES[config.query]
    return strategy.select(scores, rng, config, **{name: known[name] for name in strategy.sees})


# ------------------------------------------------------------------------------------------------------ the cold start

CLUSTERS, SMALLEST, NEIGHBOURS = 500, 5, 20  # the most clusters, the smallest one, and the neighbours [TypiClust]


def typical(features, count, rng):
    """Select `count` typical images, before there is a network: positions in `features`, float (N, D).

    After TypiClust (Hacohen et al., arXiv 2202.02794): k-means with as many clusters, at most 500, and from each
    cluster the image whose 20 nearest neighbours in it are closest. Clusters of fewer than 5 images come last."""
    from scipy.cluster.vq import kmeans2  # here, because these take half a second to import
    from scipy.spatial import cKDTree

    if count >= len(features):
        return np.arange(len(features))
    features = features.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal images leave clusters empty, which is fine
        _, cluster = kmeans2(features, first_centres(features, min(count, CLUSTERS), rng), 20, minit="matrix")
    members = np.bincount(cluster)[cluster]
    turn = np.empty(len(features), int)  # an image's place in its cluster: the clusters take turns
    for number in np.unique(cluster):
        mine = np.flatnonzero(cluster == number)
        near = min(NEIGHBOURS, len(mine) - 1) + 1  # the first one is the image itself
        distances = cKDTree(features[mine]).query(features[mine], np.arange(1, near + 1))[0]
        turn[mine[np.argsort(distances.mean(1), kind="stable")]] = np.arange(len(mine))
    return np.lexsort((-members, turn, members < SMALLEST))[:count]


def first_centres(features, count, rng):
    """The first centres of k-means++ (SciPy's own are found in a time that grows with the square of their number)."""
    nearest, chosen = np.full(len(features), np.inf), [int(rng.integers(len(features)))]
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(features - features[chosen[-1]]).sum(1))
        chances = nearest / nearest.sum() if nearest.any() else None
        chosen.append(int(rng.choice(len(features), p=chances)))
    return features[chosen]
