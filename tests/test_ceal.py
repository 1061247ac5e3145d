"""ceal.py: the score by hand, the selection against a brute-force version of the rules, the pool's guarantees."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ceal

# --------------------------------------------------------------------------------------------------------- the score


def square(size=9, low=2, high=7):
    """A 5x5 square of lesion in a 9x9 picture."""
    prediction = np.zeros((size, size), np.float32)
    prediction[low:high, low:high] = 0.9
    return prediction


def test_the_weight_inside_a_square_is_the_distance_to_its_edge():
    rings = [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 3, 2, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]
    expected = np.zeros((9, 9))
    expected[2:7, 2:7] = np.array(rings) / 3
    np.testing.assert_allclose(ceal.distance_weight(square()), expected)


def test_the_weight_on_both_sides_is_the_distance_by_brute_force():
    lesion = square() > 0.5
    cells = np.argwhere(np.ones((9, 9)))
    distance = [
        min(np.hypot(*(cell - other)) for other in cells if lesion[tuple(other)] != lesion[tuple(cell)])
        for cell in cells
    ]
    expected = np.reshape(distance, (9, 9)) / max(distance)
    np.testing.assert_allclose(ceal.distance_weight(square(), "both"), expected)


def test_the_score_is_variance_times_weight_summed():
    variance = np.zeros((9, 9))
    variance[4, 4], variance[2, 2], variance[0, 0] = 0.25, 0.12, 0.2  # weights 1, 1/3 and 0
    assert ceal.uncertainty_score(variance, square()) == pytest.approx(0.25 + 0.04)
    assert ceal.uncertainty_score(variance, square(), "none") == pytest.approx(0.57)


def test_the_contour_is_at_one_half_not_at_zero():
    faint = np.where(square() > 0, 0.9, 0.4)  # a raw sigmoid map has no zeros
    np.testing.assert_array_equal(ceal.distance_weight(faint), ceal.distance_weight(square()))


@pytest.mark.parametrize("distance", ["inside", "both", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_prediction_without_contour_has_a_finite_score(distance, value):
    score = ceal.uncertainty_score(np.full((8, 8), 0.1), np.full((8, 8), value), distance)
    undetected = value == 0 and distance == "inside"
    assert score == pytest.approx(0 if undetected else 6.4)


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="outside"):
        ceal.distance_weight(square(), "outside")


# ----------------------------------------------------------------------------------------------------- the selection


def bins_by_brute_force(scores):
    """Each score's bin among 80 of equal width."""
    low, high = min(scores), max(scores)
    edges = [low + (high - low) * k / 80 for k in range(81)]
    return np.array([max(b for b in range(80) if score >= edges[b]) for score in scores])


def pools():
    """Scores like those of a real pool: a peak of certain images, a long tail, some very low scores."""

    def build(seed):
        rng = np.random.default_rng(seed)
        parts = rng.gamma(3, 1, 700), rng.uniform(0, 20, 250), rng.uniform(0, 0.01, 50)
        return rng.permutation(np.concatenate(parts)) + rng.random() * 5

    return st.integers(0, 10**6).map(build)


@settings(max_examples=60, deadline=None)
@given(pools())
def test_queries_follow_the_rules_of_the_published_code(scores):
    groups = {k: v.tolist() for k, v in ceal.select_queries(scores, np.random.default_rng(0)).items()}
    assert [len(v) for v in groups.values()] == [10, 10, 15]
    assert len(set().union(*groups.values())) == 35

    assert set(groups["no_detection"]) == set(sorted(range(1000), key=lambda n: scores[n])[:10])

    bins = bins_by_brute_force(scores)
    count = [int(np.sum(bins == b)) for b in range(80)]
    gathered, emptiest_first = [], sorted([79, 78, 77, 76, 75], key=lambda b: count[b])
    while len(gathered) < 10 and emptiest_first:
        gathered += [n for n in range(1000) if bins[n] == emptiest_first[0]]
        emptiest_first.pop(0)
    if len(gathered) >= 10:
        assert set(groups["most_uncertain"]) <= set(gathered)
    else:
        others = sorted(set(groups["most_uncertain"]) - set(gathered), key=lambda n: scores[n])
        assert set(gathered) <= set(groups["most_uncertain"])
        better = [n for n in range(1000) if scores[n] > scores[others[0]]]
        assert set(better) <= set(groups["most_uncertain"])  # the next highest scores

    mode = count.index(max(count))
    between = {n for n in range(1000) if mode + 6 <= bins[n] < 47}
    between -= set(groups["no_detection"]) | set(groups["most_uncertain"])
    assert set(groups["random"]) <= between if len(between) >= 15 else between <= set(groups["random"])


@pytest.mark.parametrize("empty", [0, 3, 25])
def test_the_rule_empty_selects_only_images_without_detection(empty):
    scores = np.concatenate([np.zeros(empty), np.random.default_rng(0).gamma(1, 1, 500)])
    groups = ceal.select_queries(scores, np.random.default_rng(0), rule="empty")
    assert len(groups["no_detection"]) == min(empty, 10)
    assert (scores[groups["no_detection"]] == 0).all()
    assert [len(groups["most_uncertain"]), len(groups["random"])] == [10, 25 - min(empty, 10)]
    assert len(set(np.concatenate(list(groups.values())))) == 35


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(0, 200))
def test_pseudo_labels_come_from_the_fullest_bin_and_never_from_the_queries(scores, count):
    rng = np.random.default_rng(0)
    queries = np.concatenate(list(ceal.select_queries(scores, rng).values()))
    pseudo = ceal.select_pseudo_labels(scores, rng, count, queries)
    assert len(set(pseudo)) == count
    assert not set(pseudo) & set(queries)
    bins = bins_by_brute_force(scores)
    fullest = np.flatnonzero(bins == np.bincount(bins, minlength=80).argmax())
    available = set(fullest) - set(queries)
    assert set(pseudo) <= available if len(available) >= count else available <= set(pseudo)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1e6), max_size=60),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.sampled_from(["lowest", "empty"]),
)
def test_any_pool_gives_as_many_queries_as_asked_or_all_it_has(scores, counts, rule):
    groups = ceal.select_queries(np.array(scores), np.random.default_rng(1), *counts, rule)
    chosen = np.concatenate(list(groups.values()))
    assert len(set(chosen.tolist())) == len(chosen) == min(sum(counts), len(scores))
    pseudo = ceal.select_pseudo_labels(np.array(scores), np.random.default_rng(1), 7, chosen)
    assert len({*chosen, *pseudo}) == min(sum(counts) + 7, len(scores))


def test_a_short_group_is_topped_up_by_the_closest_scores():
    # Bins are 1 wide. The mode is bin 0; between 6 and 47 lie only 20 and 30; 3.5 and 49.4 are the closest.
    scores = np.array([0.0] * 20 + [0.5] * 20 + [2.5, 3.5, 20.0, 30.0, 49.4, 55.0, 80.0])
    groups = ceal.select_queries(scores, np.random.default_rng(0), no_detection=2, most_uncertain=1, random=4)
    assert groups["most_uncertain"].tolist() == [46]
    assert sorted(scores[groups["random"]]) == [3.5, 20, 30, 49.4]
    assert scores[groups["no_detection"]].tolist() == [0, 0]


def test_ties_are_broken_at_random():
    draws = [ceal.select_queries(np.zeros(100), np.random.default_rng(seed)) for seed in range(20)]
    for group in ("no_detection", "most_uncertain", "random"):
        assert len({n for groups in draws for n in groups[group].tolist()}) > 80


def test_scores_that_differ_by_rounding_alone_are_no_error():
    groups = ceal.select_queries(1 + np.arange(100) % 3 * 2e-16, np.random.default_rng(0))
    assert len(np.unique(np.concatenate(list(groups.values())))) == 35


def test_the_same_generator_gives_the_same_selection():
    scores = np.random.default_rng(3).gamma(2, 1, 500)
    first, second = (ceal.select_queries(scores, np.random.default_rng(9)) for _ in range(2))
    assert all((first[group] == second[group]).all() for group in first)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores"):
        ceal.select_queries([1, np.nan, 2], np.random.default_rng(0))


def test_pseudo_labels_grow_by_20_from_iteration_5():
    assert [ceal.pseudo_label_count(k) for k in range(1, 10)] == [0, 0, 0, 0, 20, 40, 60, 80, 100]


# ---------------------------------------------------------------------------------------------------------- the pool


def mask_of(position):
    return np.full((2, 2), position, np.uint8)


def a_pool():
    return ceal.Pool([3, 1], [mask_of(3), mask_of(1)], [8, 4, 6], [0, 2])


def test_masks_and_pseudo_labels_stay_with_their_images():
    pool = a_pool()
    pool.annotate(np.array([8]), [mask_of(8)])
    positions, targets = pool.training_set([6, 4], [mask_of(6), mask_of(4)])
    assert sorted(positions) == [1, 3, 4, 6, 8]
    assert [target[0, 0] for target in targets] == positions.tolist()
    assert pool.annotations == 3
    assert pool.unlabelled.tolist() == [4, 6]  # pseudo-labelled images stay in the pool


@pytest.mark.parametrize("position", [0, 2, 1, 99])
def test_images_outside_the_pool_are_neither_annotated_nor_pseudo_labelled(position):
    for act in (a_pool().annotate, a_pool().training_set):
        with pytest.raises(ValueError, match="not in the pool"):
            act([position], [mask_of(position)])


def test_an_image_is_not_asked_for_twice():
    pool = a_pool()
    with pytest.raises(ValueError, match="named twice"):
        pool.annotate([4, 4], [mask_of(4), mask_of(4)])
    pool.annotate([4], [mask_of(4)])
    with pytest.raises(ValueError, match="not in the pool"):
        pool.annotate([4], [mask_of(4)])


def labels(pool):
    positions, masks = pool.training_set()
    return dict(zip(positions.tolist(), (int(mask[0, 0]) for mask in masks)))


def test_a_corrected_mask_keeps_its_place_in_the_training_set():
    pool = a_pool()
    pool.annotate([8, 4], [mask_of(8), mask_of(4)])
    pool.correct([8], [mask_of(99)])
    assert list(labels(pool).items()) == [(3, 3), (1, 1), (8, 99), (4, 4)]
    assert pool.annotations == 4


def test_a_labelled_image_can_be_rejected_and_a_rejected_one_labelled():
    pool = a_pool()
    pool.annotate([8], [mask_of(8)])
    pool.reject([4])
    pool.correct([4], [mask_of(4)], rejected=[8])
    assert list(labels(pool)) == [3, 1, 4]
    assert pool.unlabelled.tolist() == [6]  # neither returns to the pool
    pool.correct([8], [mask_of(9)], rejected=[4])
    assert labels(pool) == {3: 3, 1: 1, 8: 9}


@pytest.mark.parametrize("position", [6, 0, 99])
def test_an_image_without_an_answer_cannot_be_corrected(position):
    pool = a_pool()
    for positions, rejected in (([position], []), ([], [position])):
        with pytest.raises(ValueError, match="neither labelled nor rejected"):
            pool.correct(positions, [mask_of(1)] * len(positions), rejected)
    assert labels(pool) == {3: 3, 1: 1}


def test_the_pool_cannot_be_changed_from_outside():
    pool = a_pool()
    with pytest.raises(ValueError, match="read-only"):
        pool.unlabelled[0] = 2
    with pytest.raises(AttributeError):
        pool.unlabelled = np.array([2])


def test_a_test_image_cannot_be_labelled_too():
    with pytest.raises(ValueError, match="in two of"):
        ceal.Pool([1], [mask_of(1)], [2], [1])


def test_ceal_does_not_import_tensorflow():
    code = "import sys, ceal; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
