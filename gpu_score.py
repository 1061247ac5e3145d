"""The score of an image, as a graph for a GPU: what ceal.uncertainty_score computes on a CPU, up to rounding.

SciPy's distance transform takes a CPU longer than the passes take a GPU; here it is two searches for a minimum.
"""

import functools

from devices import tf


@functools.lru_cache
def scored(distance, xla):
    """A function of (mean, uncertainty), float32 (N, H, W), to what Trainer.scored returns: the scores, float64 (N,),
    the predicted lesions, bool (N, H, W), and utils.expected_agreement, float64 (N,). distance: a key of DISTANCES."""

    def reduce(mean, uncertainty):
        total, square = (tf.reduce_sum(tf.cast(values, tf.float64), (1, 2)) for values in (mean, tf.square(mean)))
        agreement = tf.where(total > 0, tf.math.divide_no_nan(square, total), tf.ones_like(total))
        return uncertainty_scores(uncertainty, mean, distance, xla), mean > 0.5, agreement

    return reduce


def squared_distances(lesion):
    """Each pixel's squared distance to the nearest pixel that is not lesion, float32 (N, H, W), exact; at least
    (H + W)^2 without such a pixel. lesion: bool (N, H, W)."""
    height, width = lesion.shape[1:]
    far = float(height + width)  # further than any pixel of the image

    def steps(count):
        line = tf.range(count, dtype=tf.float32)
        return tf.abs(line[:, None] - line[None])

    # First within the column, then over the columns: (N, H, H, W) and (N, H, W, W), which XLA never stores.
    in_column = tf.reduce_min(steps(height)[None, :, :, None] + tf.where(lesion, far, 0.0)[:, None], axis=2)
    return tf.reduce_min(tf.square(steps(width)) + tf.square(in_column)[:, :, None], axis=3)


def distances(lesion, xla):
    """The square roots, float64. Without XLA an image at a time, because then (N, H, W, W) is stored."""
    if not xla:
        return tf.map_fn(lambda one: distances(one[None], True)[0], lesion, fn_output_signature=tf.float64)
    return tf.sqrt(tf.cast(squared_distances(lesion), tf.float64))


# As ceal.DISTANCE_WEIGHTS, before they are scaled.
DISTANCES = {
    "inside": distances,
    "both": lambda lesion, xla: distances(lesion, xla) + distances(~lesion, xla),
    "none": lambda lesion, xla: tf.ones_like(lesion, tf.float64),
}


def uncertainty_scores(uncertainty, mean, distance, xla):
    """The score of each image, float64 (N,). uncertainty, mean: float32 (N, H, W), of the passes; distance: a key of
    DISTANCES."""
    lesion = mean > 0.5
    weights = DISTANCES[distance](lesion, xla)
    weights = tf.math.divide_no_nan(weights, tf.reduce_max(weights, axis=(1, 2), keepdims=True))
    whole = tf.reduce_all(lesion, axis=(1, 2), keepdims=True)
    if distance == "both":  # no contour either way
        whole |= ~tf.reduce_any(lesion, axis=(1, 2), keepdims=True)
    weights = tf.where(whole, tf.ones_like(weights), weights)
    return tf.reduce_sum(tf.cast(uncertainty, tf.float64) * weights, axis=(1, 2))
