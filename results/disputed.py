"""Can a network tell on which images specialists disagree? It chose utils.LIKELY_DISPUTED and --least-agreement.

    PYTHONPATH=. python results/disputed.py human_agreement.csv datasets/isic2017_96x128.h5 \\
        runs/NAME/iteration_00/model.weights.h5 runs/NAME/iteration_04/model.weights.h5

The images are those with known agreement of two people that are not for test and that the run had not labelled then.
The threshold is the one with the highest sensitivity + specificity on one half of them, for the first weights file; all
files are checked on the other half. With --test the files are checked on the test images, with the threshold in use.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from agreement import DISPUTED, read_agreement
from ceal import uncertainty_score
from data import Dataset, split
from sampler import mc_dropout
from unet import load_unet
from utils import LIKELY_DISPUTED, expected_agreement, read_csv, run_command


def known_images(dataset, agreement, weights, test):
    """The positions with known agreement: of test images, or of those that the weights' run had in its pool."""
    parts = split(dataset)
    positions = parts.test if test else np.sort(np.concatenate([parts.initial, parts.pool]))
    folder = weights.parent
    number = folder.name.removeprefix("iteration_")
    scores = folder.with_name(f"iteration_{int(number) + 1:02d}") / "scores.csv" if number.isdecimal() else folder
    if scores.is_file() and not test:
        pool = {row["id"] for row in read_csv(scores)}
        positions = positions[[id in pool for id in dataset.ids[positions]]]
    return positions[[id in agreement for id in dataset.ids[positions]]]


def area_under_curve(values, disputed):
    """The chance that a disputed image has a lower value than another one."""
    count, ranks = disputed.sum(), rankdata(-values)
    return (ranks[disputed].sum() - count * (count + 1) / 2) / (count * (~disputed).sum())


def with_interval(statistic, *samples):
    """A statistic of paired samples with its 95 % bootstrap interval over the images, as text."""
    rng, count = np.random.default_rng(0), len(samples[0])
    draws = rng.integers(count, size=(2000, count))
    low, high = np.nanquantile([statistic(*(values[some] for values in samples)) for some in draws], [0.025, 0.975])
    return f"{statistic(*samples):.3f} ({low:.3f} to {high:.3f})"


def best_threshold(values, disputed):
    """The threshold, a multiple of 0.01, with the highest sensitivity + specificity."""
    tried = np.arange(40, 100) / 100
    return tried[np.argmax([(values[disputed] < t).mean() + (values[~disputed] >= t).mean() for t in tried])]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agreement", type=Path)
    parser.add_argument("data")
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--test", action="store_true")
    args = parser.parse_args()
    agreement, threshold = read_agreement(args.agreement), LIKELY_DISPUTED if args.test else None
    halves = dict(zip(sorted(agreement), np.random.default_rng(0).permutation(len(agreement)) % 2))
    with Dataset(args.data) as dataset:
        for weights in args.weights:
            positions = known_images(dataset, agreement, weights, args.test)
            ids, (model, settings) = dataset.ids[positions], load_unet(weights)
            normalisation = {name: settings[name] for name in ("mean", "std")}
            mean, variance = mc_dropout(model, dataset.images(positions), 10, 1, positions, **normalisation)
            expected, people = expected_agreement(mean), np.array([agreement[id] for id in ids])
            scores = np.array([uncertainty_score(v, m) for v, m in zip(variance, mean)])
            first = np.array([halves[id] == 0 for id in ids]) & (not args.test)
            if threshold is None:
                threshold = best_threshold(expected[first], people[first] < DISPUTED)
            print_one(weights, threshold, *(values[~first] for values in (expected, scores, people)))
            if not args.test:
                print_rules(expected, scores, people)


def print_one(weights, threshold, expected, scores, people):
    """Print how well the score and the expected agreement find the disputed images, and how well the threshold does."""
    disputed = people < DISPUTED
    print(f"{weights}: {len(people)} images to check on, {disputed.sum()} of them disputed")
    for name, values in ("score", -scores), ("expected agreement", expected):
        print(f"  area under the curve, {name}: {with_interval(area_under_curve, values, disputed)}")
    found = expected < threshold
    print(f"  expected agreement below {threshold:.2f}:")
    print(f"    sensitivity {with_interval(lambda f, d: f[d].mean(), found, disputed)}")
    print(f"    specificity {with_interval(lambda f, d: (~f)[~d].mean(), found, disputed)}")


def print_rules(expected, scores, people):
    """Print the people's mean agreement over the images of the pool, and over those that `undisputed` asks for."""
    print(f"  people's agreement, all {len(people)} images of the pool: {people.mean():.3f}")
    for least in 0.0, 0.65, 0.7, 0.72, 0.75:
        weights = scores * (expected >= least)
        mean = np.average(people, weights=weights)
        print(f"    --least-agreement {least:<4}: asked for {mean:.3f}, left out {(expected < least).mean():.1%}")


if __name__ == "__main__":
    run_command(main)
