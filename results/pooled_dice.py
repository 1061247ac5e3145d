"""The Dice coefficient of a run's test.csv: mean over the images and pooled over all their pixels, each with a 95 %
bootstrap interval over the images.

    python results/pooled_dice.py results/published/reading_c/test.csv

The published code pools over a batch; everything else here averages over images. The counts of pixels
follow from sensitivity, specificity and accuracy, rounded to six digits: the result is exact to about 0.001.
"""

import sys

import numpy as np
from scipy.stats import bootstrap

test = np.genfromtxt(sys.argv[1], delimiter=",", names=True)
sensitivity, specificity, accuracy = test["sensitivity"], test["specificity"], test["accuracy"]
lesion = (accuracy - specificity) / (sensitivity - specificity)  # the lesion's share of the pixels in the true mask
overlap, predicted = sensitivity * lesion, sensitivity * lesion + (1 - specificity) * (1 - lesion)


def pooled_dice(images, axis=-1):
    """Of these images, an int array of positions in the file."""
    return 2 * overlap[images].sum(axis) / (lesion[images] + predicted[images]).sum(axis)


def mean_dice(images, axis=-1):
    """Of these images, as in `pooled_dice`."""
    return test["dice"][images].mean(axis)


images = np.arange(len(test))
for name, function in ("per image", mean_dice), ("pooled", pooled_dice):
    found = bootstrap((images,), function, method="percentile", rng=0).confidence_interval
    print(f"{len(test)} images, Dice {name}: {function(images):.4f} ({found.low:.4f} to {found.high:.4f})")
