"""The folds by origin: which of the 1,600 labelled images of ISIC 2017 belong together.

    python results/folds/origins.py datasets/isic2017_rgb_96x128.h5 [--sizes original_sizes.csv]

Writes folds.csv (`id, fold`) beside this file and prints a table of the folds. The data file is one that `data.py isic`
made. --sizes: `id, width, height` of the original images, if the data file was made from smaller copies.
"""

import argparse
import bisect
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data import Dataset, split  # noqa: E402
from utils import read_csv, run_command, write_csv  # noqa: E402

# The archive numbered its images source by source. Each range of numbers begins here and ends before the next one.
RANGES = [
    (0, "circles"),
    (157, "slides"),
    (236, "circles"),
    (376, "ticks"),
    (458, "bar"),
    (557, "stickers"),
    (1100, "circles"),
    (1153, "stickers"),
    (9868, "ticks"),
    (12000, "bar"),
    (14560, "stickers"),  # photographs by a telephone, a source of its own, too small for a fold
    (14655, "slides"),
]


def fold_of(id):
    """The fold of an image, given its id, for instance ISIC_0000157."""
    firsts, names = zip(*RANGES)
    return names[bisect.bisect_right(firsts, int(id.removeprefix("ISIC_"))) - 1]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a file that `data.py isic` made")
    parser.add_argument("--sizes", metavar="FILE", help="csv file of the original sizes")
    args = parser.parse_args()
    with Dataset(args.data) as dataset:
        parts = split(dataset)
        labelled = np.sort(np.concatenate([parts.initial, parts.pool]))
        ids, area = dataset.ids[labelled], dataset.masks(labelled).mean((1, 2))
        sizes = dict(zip(ids, (f"{width}x{height}" for height, width in dataset.original_sizes[labelled])))
    if args.sizes:
        sizes = {id: f"{width}x{height}" for id, width, height in map(dict.values, read_csv(args.sizes))}
    folds = np.array([fold_of(id) for id in ids])
    write_csv(HERE / "folds.csv", ["id", "fold"], zip(ids, folds))
    print("| fold | images | lesion area: mean | median | most frequent original sizes |")
    print("| --- | ---: | ---: | ---: | --- |")
    for fold in dict.fromkeys(name for _, name in RANGES):
        members = folds == fold
        common = Counter(sizes[id] for id in ids[members]).most_common(4)
        shares = f"{area[members].mean():.1%} | {np.median(area[members]):.1%}"
        print(f"| `{fold}` | {members.sum()} | {shares} | {', '.join(f'{size} ({n})' for size, n in common)} |")


if __name__ == "__main__":
    run_command(main)
