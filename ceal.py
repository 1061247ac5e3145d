"""The decisions of Cost-Effective Active Learning: an image's score, whom to ask about, what to trust the network with.

NumPy and SciPy only. [P]: the paper (arXiv 1711.09168) says it; [C]: its published code does it.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt

BINS = 80  # of the histogram of scores [C]
UNCERTAIN_BINS = 5  # the last ones hold the most uncertain images [C]
RANDOM_FROM, RANDOM_TO = 6, 47  # random images lie between the lower edges of bin (mode + 6) and bin 47 [C]


# ------------------------------------------------------------------------------------------------- the image's score


def distance_weight(prediction, distance="inside"):
    """Each pixel's Euclidean distance to the predicted contour, scaled to [0, 1] in each image [P, section 2].

    prediction: probabilities (H, W); its contour is where it crosses 0.5. distance: `inside`, the distance of lesion
    pixels, 0 outside [C]; `both`, on both sides of the contour; `none`, 1 everywhere. Returns float64 (H, W).
    Without a contour there is no distance: an empty prediction weighs 0 under `inside`, so that an undetected lesion
    scores 0; a full one weighs 1, and so do both under `both`.
    """
    lesion = np.asarray(prediction) > 0.5
    if distance == "none":
        return np.ones(lesion.shape)
    if distance not in ("inside", "both"):
        raise ValueError(f"distance must be inside, both or none, not {distance!r}")
    if lesion.all() or not lesion.any():
        return np.full(lesion.shape, 1.0 if distance == "both" or lesion.any() else 0.0)
    weight = distance_transform_edt(lesion)
    if distance == "both":
        weight += distance_transform_edt(~lesion)
    return weight / weight.max()


def uncertainty_score(variance, prediction, distance="inside"):
    """The image's score: the sum over pixels of uncertainty times distance to the predicted contour [P, section 2].

    variance: the uncertainty map (H, W); prediction, distance: as in `distance_weight`. Returns a float.
    """
    return float(np.sum(variance * distance_weight(prediction, distance)))


# -------------------------------------------------------------------------------------------------------- the choice


def select_queries(scores, rng, no_detection=10, most_uncertain=10, random=15):
    """Whom to ask the oracle about: a dict of group name to positions in `scores` [P, section 3; C].

    - no_detection: the lowest scores;
    - most_uncertain: from the last 5 of 80 bins, the emptiest first (of equally empty ones the more uncertain) until
      there are enough, then at random among those gathered;
    - random: at random among the images between the lower edges of bin (mode + 6) and bin 47; where the first is the
      higher one, there are none.
    The groups are filled in this order and never overlap. One that its rule leaves short is topped up with the
    images not yet chosen whose scores are closest to the range between the edges that the rule looks at. Ties are
    broken at random. When the pool holds fewer images than are asked for, all of them are chosen.
    scores: float (N,), finite; rng: numpy.random.Generator.
    """
    scores, bins, counts, edges = _histogram(scores)
    by_score = np.lexsort((rng.random(len(scores)), scores))
    groups = {"no_detection": by_score[:no_detection]}

    last = sorted(range(BINS - UNCERTAIN_BINS, BINS), key=lambda b: (counts[b], -b))
    enough = np.searchsorted(np.cumsum(counts[last]), most_uncertain) + 1
    free = np.setdiff1d(np.flatnonzero(np.isin(bins, last[:enough])), groups["no_detection"])
    uncertain_range = edges[BINS - UNCERTAIN_BINS], edges[BINS]
    groups["most_uncertain"] = _draw(free, most_uncertain, uncertain_range, scores, groups["no_detection"], rng)

    chosen = np.concatenate(list(groups.values()))
    first = min(np.argmax(counts) + RANDOM_FROM, BINS)
    free = np.setdiff1d(np.flatnonzero((bins >= first) & (bins < RANDOM_TO)), chosen)
    random_range = sorted((edges[first], edges[RANDOM_TO]))
    groups["random"] = _draw(free, random, random_range, scores, chosen, rng)
    return groups


def select_uniform(pool_size, rng, count):
    """The baseline: `count` positions at random from a whole pool of that size, or all if there are fewer."""
    return rng.choice(pool_size, min(count, pool_size), replace=False)


def select_pseudo_labels(scores, rng, count, exclude=()):
    """Whom to let the network label itself: `count` positions in `scores`, at random from the fullest bin [C].

    Never one of the positions `exclude` (the queries). Topped up and tied as in `select_queries`.
    """
    scores, bins, counts, edges = _histogram(scores)
    mode = np.argmax(counts)
    exclude = np.asarray(exclude, int)
    free = np.setdiff1d(np.flatnonzero(bins == mode), exclude)
    return _draw(free, count, (edges[mode], edges[mode + 1]), scores, exclude, rng)


def pseudo_label_count(iteration, start=5, first=20, step=20):
    """How many pseudo-labels in this iteration (from 1): none before `start`, then 20, 40, 60, ... [C]."""
    return 0 if iteration < start else first + step * (iteration - start)


def _histogram(scores):
    """(scores as float64 (N,), each one's bin (N,), images in each bin (80,), the bins' edges (81,))."""
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.sum(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 1.0)
    if high - low < 1e-12 * max(1.0, high):  # equal but for rounding: all in one bin, as np.histogram has equal ones
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(scores, BINS, (low, high))
    bins = np.searchsorted(edges, scores, side="right") - 1
    return scores, np.minimum(bins, BINS - 1), counts, edges  # the last bin includes its upper edge


def _draw(free, count, score_range, scores, taken, rng):
    """`count` of the positions `free` at random; if they are too few, all of them and then, of the positions neither
    free nor taken, those whose scores are closest to `score_range` (low, high)."""
    if len(free) >= count:
        return rng.choice(free, count, replace=False)
    low, high = score_range
    rest = np.setdiff1d(np.arange(len(scores)), np.concatenate([free, taken]))
    distance = np.maximum(low - scores[rest], 0) + np.maximum(scores[rest] - high, 0)
    nearest = rest[np.lexsort((rng.random(len(rest)), distance))]
    return np.concatenate([free, nearest[: count - len(free)]])


# -------------------------------------------------------------------------------------------- the pool and the oracle


class Pool:
    """Who is labelled, who is not, and who is for test, by position in the whole data set.

    What is scored is `unlabelled`, which cannot be written to from outside; what is asked for goes through `annotate`,
    and what is trained on comes from `training_set`: both refuse what is not in the pool (ValueError).
    """

    def __init__(self, labelled, masks, unlabelled, test):
        """labelled, unlabelled, test: positions; masks: uint8 0/1 (len(labelled), H, W)."""
        everyone = np.concatenate([labelled, unlabelled, test])
        if len(np.unique(everyone)) < len(everyone):
            raise ValueError("an image is in two of labelled, unlabelled and test")
        self._set_unlabelled(np.sort(unlabelled))
        self.test = np.sort(test)
        self._masks = dict(zip(map(int, labelled), masks, strict=True))

    def _set_unlabelled(self, positions):
        positions.setflags(write=False)
        self._unlabelled = positions

    @property
    def unlabelled(self):
        """The positions that are neither labelled nor for test, sorted; read-only."""
        return self._unlabelled

    @property
    def annotations(self):
        """The number of labelled images, the initial ones included."""
        return len(self._masks)

    def annotate(self, positions, masks):
        """Take the oracle's masks for these positions; they leave the pool."""
        self._require_unlabelled(positions)
        self._masks.update(zip(map(int, positions), masks, strict=True))
        self._set_unlabelled(np.setdiff1d(self.unlabelled, positions))

    def training_set(self, pseudo_positions=(), pseudo_labels=()):
        """Positions (n,) and labels, a list of n (H, W) in [0, 1]: every annotation, uint8, then these pseudo-labels.

        The pseudo-labelled images stay in the pool [C].
        """
        self._require_unlabelled(pseudo_positions)
        positions = np.array([*self._masks, *pseudo_positions], int)
        labels = [*self._masks.values(), *pseudo_labels]
        if len(labels) != len(positions):
            raise ValueError(f"{len(pseudo_labels)} pseudo-labels for {len(pseudo_positions)} images")
        return positions, labels

    def _require_unlabelled(self, positions):
        foreign = np.setdiff1d(positions, self.unlabelled)
        if len(foreign) or len(np.unique(positions)) < len(positions):
            raise ValueError(f"not in the pool, or named twice: {foreign.tolist() or list(positions)}")


class SimulatedOracle:
    """Answers with the masks that are known already. read_masks: positions -> uint8 0/1 (n, H, W)."""

    def __init__(self, read_masks):
        self._read_masks = read_masks

    def annotate(self, positions):
        """The masks of these positions, uint8 0/1 (n, H, W), in their order."""
        return self._read_masks(positions)
