"""Means of predict.py's metrics by the lesion's size and by origin, as in weights/README.md.

    python results/folds/groups.py datasets/isic2017_rgb_96x128.h5 results/best/metrics_plain.csv [MORE.csv ...]

Prints a table for each file: Dice and Jaccard with 95 % bootstrap intervals over the images, the number of images with
an empty mask, and of those with a mask that misses the lesion. The data file, of `data.py isic`, has the true masks.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from origins import fold_of  # noqa: E402

from data import Dataset  # noqa: E402
from predict import mean_intervals  # noqa: E402
from utils import read_csv, run_command  # noqa: E402

SIZES = {"below 3 %": 0.03, "3 to 10 %": 0.1, "10 to 30 %": 0.3, "30 to 60 %": 0.6, "above 60 %": 1.01}


def size_of(share):
    """The group of a lesion that covers this share of the picture."""
    return next(name for name, limit in SIZES.items() if share < limit)


def print_table(rows, shares):
    """Print the table of one file. rows: its rows, a dict each; shares: a dict of id to the lesion's share."""
    metrics = np.array([[float(row[name]) for name in ("dice", "jaccard")] for row in rows]).T
    wrong = np.array([float(row["sensitivity"]) == 0 for row in rows])
    empty = wrong & [float(row["specificity"]) == 1 for row in rows]
    groups = {"all": np.full(len(rows), True)}
    for group_of in (lambda id: size_of(shares[id])), fold_of:
        names = np.array([group_of(row["id"]) for row in rows])
        groups |= {name: names == name for name in sorted(set(names), key=[*SIZES, *sorted(names)].index)}
    print("| group | images | Dice | Jaccard | empty | missed |\n| --- | ---: | --- | --- | ---: | ---: |")
    for name, members in groups.items():
        found = ("{:.3f} ({:.3f} to {:.3f})".format(*values) for values in zip(*mean_intervals(metrics[:, members])))
        missed = (wrong & ~empty)[members].sum()
        print(f"| {name} | {members.sum()} | {' | '.join(found)} | {empty[members].sum()} | {missed} |")


def main():
    """The command line."""
    data, *files = sys.argv[1:]
    with Dataset(data) as dataset:
        shares = dict(zip(dataset.ids, dataset.masks(np.arange(len(dataset.ids))).mean((1, 2))))
    for file in files:
        print(f"\n{file}\n")
        print_table(read_csv(Path(file)), shares)


if __name__ == "__main__":
    run_command(main)
