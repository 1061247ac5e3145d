"""The decisions of Cost-Effective Active Learning: the score of an image, the images to annotate, the images to
pseudo-label, and the pool.

Nothing here knows files, people or networks.
[P]: the paper (arXiv 1711.09168) says so; [C]: its published code does so.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects

BINS = 80  # of the histogram of scores [C]
UNCERTAIN_BINS = 5  # the last ones hold the most uncertain images [C]
RANDOM_FROM, RANDOM_TO = 6, 47  # random images lie between the lower edges of bin (mode + 6) and bin 47 [C]


# ------------------------------------------------------------------------------------------------ the score of an image


def inside(lesion):
    """Distance to the contour inside the lesion, 0 outside [C]; 0 for an empty lesion, 1 for one without background."""
    if lesion.all() or not lesion.any():
        return np.full(lesion.shape, float(lesion.all()))
    weights = np.zeros(lesion.shape)
    # The background that is nearest to a pixel of the lesion is not beyond the pixels around its bounding box.
    (box,) = find_objects(lesion.view(np.uint8))
    box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
    weights[box] = _scaled(distance_transform_edt(lesion[box]))
    return weights


def both(lesion):
    """Distance to the contour on both sides; 1 where there is no contour."""
    if lesion.all() or not lesion.any():
        return np.ones(lesion.shape)
    return _scaled(distance_transform_edt(lesion) + distance_transform_edt(~lesion))


def unweighted(lesion):
    """No weight: 1 everywhere."""
    return np.ones(lesion.shape)


def _scaled(distances):
    return distances / (distances.max() or 1.0)


# The choices of --distance: a predicted lesion, bool (H, W), to the weight of each pixel, float64 (H, W) in [0, 1].
DISTANCE_WEIGHTS = {"inside": inside, "both": both, "none": unweighted}


def distance_weight(prediction, distance="inside"):
    """Each pixel's Euclidean distance to the predicted contour, scaled to [0, 1] in each image [P, section 2].

    prediction: probabilities (H, W); the contour is where they cross 0.5. distance: a key of DISTANCE_WEIGHTS.
    Returns float64 (H, W). Under `inside` an undetected lesion has weight 0 everywhere, and so scores 0.
    Raises ValueError for an unknown distance.
    """
    if distance not in DISTANCE_WEIGHTS:
        raise ValueError(f"distance must be one of {', '.join(DISTANCE_WEIGHTS)}, not {distance!r}")
    return DISTANCE_WEIGHTS[distance](np.asarray(prediction) > 0.5)


def uncertainty_score(variance, prediction, distance="inside"):
    """The score of an image: the sum over its pixels of uncertainty times distance to the contour [P, section 2].

    variance: the uncertainty map (H, W); prediction, distance: as in `distance_weight`. Returns a float.
    """
    return float(np.sum(variance * distance_weight(prediction, distance)))


# ------------------------------------------------------------------------------------------------------- the selection


def select_queries(scores, rng, no_detection=10, most_uncertain=10, random=15, rule="lowest"):
    """Select the images to annotate, in three groups [P, section 3; C].

    - no_detection: the lowest scores. With rule `empty` (ours) only scores of 0, which empty predictions have; each
      image that is missing then is added to `random`.
    - most_uncertain: at random among the images of the emptiest of the last 5 of 80 bins. As many bins are taken as
      hold enough images; of two equally empty bins the more uncertain one comes first.
    - random: at random among the images between the lower edges of bin (mode + 6) and bin 47. If the first edge is the
      higher one, the range between the edges is empty.
    The groups are filled in this order and never overlap. A group that its rule leaves short is topped up with the
    images not yet selected whose scores are closest to the group's range. Ties are broken at random. If the pool holds
    fewer images than are asked for, all are selected.
    "no_detection" is the paper's name: after good training most of these lesions are detected.
    scores: float (N,), finite; rng: numpy.random.Generator. Returns a dict of group to positions in `scores`.
    """
    scores, bins, counts, edges = histogram(scores)
    by_score = np.lexsort((rng.random(len(scores)), scores))  # ties at random
    lowest = by_score[:no_detection]
    if rule == "empty":
        random += np.count_nonzero(scores[lowest])
        lowest = lowest[scores[lowest] == 0]
    groups = {"no_detection": lowest}

    last = sorted(range(BINS - UNCERTAIN_BINS, BINS), key=lambda b: (counts[b], -b))
    bin_count = np.searchsorted(np.cumsum(counts[last]), most_uncertain) + 1
    free = without(np.flatnonzero(np.isin(bins, last[:bin_count])), groups["no_detection"])
    uncertain_range = edges[BINS - UNCERTAIN_BINS], edges[BINS]
    groups["most_uncertain"] = draw(free, most_uncertain, uncertain_range, scores, groups["no_detection"], rng)

    selected = np.concatenate(list(groups.values()))
    low, high = random_range(counts, edges)
    free = without(np.flatnonzero((scores >= low) & (scores < high)), selected)
    groups["random"] = draw(free, random, sorted((low, high)), scores, selected, rng)
    return groups


def random_range(counts, edges):
    """The two scores that bound the random group: the lower edges of bin (mode + 6) and of bin 47 of `histogram`. The
    first may be the higher one [C]."""
    return edges[min(np.argmax(counts) + RANDOM_FROM, BINS)], edges[RANDOM_TO]


def select_pseudo_labels(scores, rng, count, exclude=()):
    """Select the images to pseudo-label: `count` positions in `scores`, at random from the fullest bin [C].

    Most images are certain and right, so the fullest bin holds such images [P]; nothing checks that it does.
    Positions in `exclude` (the queries) are never selected. Topped up, and ties broken, as in `select_queries`.
    """
    scores, bins, counts, edges = histogram(scores)
    mode = np.argmax(counts)
    exclude = np.asarray(exclude, int)
    free = without(np.flatnonzero(bins == mode), exclude)
    return draw(free, count, (edges[mode], edges[mode + 1]), scores, exclude, rng)


def pseudo_label_count(iteration, start=5, first=20, step=20):
    """The number of pseudo-labels in this iteration (from 1): 0 before `start`, then 20, 40, 60, ... [C]."""
    return 0 if iteration < start else first + step * (iteration - start)


def histogram(scores):
    """Returns scores as float64 (N,), the bin of each (N,), the images in each bin (80,), the edges of the bins (81,).

    Raises ValueError if a score is not finite.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.sum(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 1.0)
    if high - low < 1e-12 * max(1.0, high):  # equal but for rounding: all in one bin, as np.histogram does if equal
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(scores, BINS, (low, high))
    bins = np.searchsorted(edges, scores, side="right") - 1
    return scores, np.minimum(bins, BINS - 1), counts, edges  # the last bin includes its upper edge


def without(positions, removed):
    """The positions that are not among `removed`, in their order. Much faster than np.setdiff1d, which sorts."""
    return positions[~np.isin(positions, removed)]


def draw(free, count, score_range, scores, taken, rng):
    """Draw `count` of the positions `free` at random. If they are too few: all of them, and those positions, neither
    free nor taken, whose scores are closest to `score_range` (low, high)."""
    if len(free) >= count:
        return rng.choice(free, count, replace=False)
    low, high = score_range
    rest = without(np.arange(len(scores)), np.concatenate([free, taken]))
    distance = np.maximum(low - scores[rest], 0) + np.maximum(scores[rest] - high, 0)
    nearest = rest[np.lexsort((rng.random(len(rest)), distance))]
    return np.concatenate([free, nearest[: count - len(free)]])


# ------------------------------------------------------------------------------------------------------------- the pool


class Pool:
    """Which images are labelled, unlabelled or test images, by their positions in the whole data set.

    The loop scores `unlabelled` (read-only), moves images out of it with `annotate` and `reject`, and trains on
    `training_set`. All three raise ValueError for a position that is not in the pool. `correct` changes an earlier
    answer.
    """

    def __init__(self, labelled, masks, unlabelled, test):
        """labelled, unlabelled, test: positions; masks: uint8 0/1 (len(labelled), H, W)."""
        everything = np.sort(np.concatenate([labelled, unlabelled, test]))
        if (everything[1:] == everything[:-1]).any():
            raise ValueError("an image is in two of labelled, unlabelled and test")
        self._set_unlabelled(np.sort(unlabelled))
        self.test = np.sort(test)
        self._masks = dict(zip(map(int, labelled), masks, strict=True))
        self._rejected = set()

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
        self._set_unlabelled(without(self.unlabelled, positions))

    def reject(self, positions):
        """Remove these positions from the pool without a mask."""
        self._require_unlabelled(positions)
        self._rejected.update(map(int, positions))
        self._set_unlabelled(without(self.unlabelled, positions))

    def correct(self, positions, masks, rejected=()):
        """Take other answers for labelled or rejected images: masks for `positions`, and the images now `rejected`. A
        labelled image keeps its place in `training_set`. Raises ValueError for an image without an earlier answer."""
        foreign = {*map(int, positions), *map(int, rejected)} - self._masks.keys() - self._rejected
        if foreign:
            raise ValueError(f"neither labelled nor rejected: {sorted(foreign)}")
        self._masks.update(zip(map(int, positions), masks, strict=True))
        self._rejected.difference_update(map(int, positions))
        for position in map(int, rejected):
            self._masks.pop(position, None)
            self._rejected.add(position)

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
        foreign = np.unique(without(np.asarray(positions, int), self.unlabelled))
        if len(foreign) or len(np.unique(positions)) < len(positions):
            raise ValueError(f"not in the pool, or named twice: {foreign.tolist() or list(positions)}")
