"""The Dice coefficient pooled over all images of a run's test.csv, with a 95 % bootstrap interval over the images.

    python results/pooled_dice.py results/published/test.csv

The published code averages in this way over a batch; everything else here averages over images. The counts of pixels
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


images = np.arange(len(test))
found = bootstrap((images,), pooled_dice, method="percentile", rng=0).confidence_interval
print(f"{len(test)} images: Dice {test['dice'].mean():.4f} per image, {pooled_dice(images):.4f} pooled", end=" ")
print(f"({found.low:.4f} to {found.high:.4f})")
