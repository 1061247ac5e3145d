"""gpu_score.py: the scores of ceal.uncertainty_score, in a graph, with and without XLA."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import ceal
import gpu_score
from devices import tf
from utils import expected_agreement


@pytest.fixture(scope="module")
def maps():
    """Uncertainty and mean, float32 (10, 24, 37): shapes with holes, several parts and pixels at the border; empty; all
    lesion; all but a pixel; one pixel."""
    rng = np.random.default_rng(5)
    noise = gaussian_filter(rng.normal(size=(10, 24, 37)), (0, 3, 3))
    mean = np.float32(0.5 + 5 * noise).clip(0, 1)
    mean[6], mean[7] = 0.5, 1
    mean[8], mean[8, 3, 30] = 1, 0
    mean[9], mean[9, 23, 0] = 0, 1
    return np.float32(rng.random(mean.shape)), mean


@pytest.mark.parametrize("distance", ceal.DISTANCE_WEIGHTS)
@pytest.mark.parametrize("xla", [False, True])
def test_the_scores_are_those_of_a_cpu(maps, distance, xla):
    uncertainty, mean = maps
    reduce = tf.function(gpu_score.scored(distance, xla), jit_compile=xla)
    scores, lesion, agreement = (values.numpy() for values in reduce(tf.constant(mean), tf.constant(uncertainty)))
    expected = [ceal.uncertainty_score(u, m, distance) for u, m in zip(uncertainty, mean)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(lesion, mean > 0.5)
    np.testing.assert_allclose(agreement, expected_agreement(mean), rtol=1e-12)
