"""What is in the sets of labels that labels.py trained on: disputed images among the queries, and the lesions' size.

    PYTHONPATH=. python results/label_sets.py human_agreement.csv results/labels 205 1-5 ceal,random,ceal-disputed

Means over the seeds, of the images that were asked for after the first labels: how many have several people's masks,
on how many of these two people disagree, their mean agreement, and the lesions' share of the picture, in percent.
"""

import sys
from pathlib import Path

import numpy as np

from agreement import disputed_images, read_agreement
from data import Dataset
from experiment import REGIMES, Run, read_base, read_seeds
from labels import labels_of
from utils import run_command


def main():
    """The command line."""
    agreement, out, annotations, seeds, arms = sys.argv[1:]
    people = read_agreement(Path(agreement))
    disputed = disputed_images(people)
    base = read_base(["--preset", "quick"])
    print(
        "| arm | asked for | several masks | disputed | agreement | lesion, % |\n| --- | --- | --- | --- | --- | --- |"
    )
    with Dataset(base.data) as dataset:
        for arm in arms.split(","):
            rows = []
            for seed in read_seeds(seeds):
                run = Run(REGIMES[0], arm, seed)
                _, parts, pool, _ = labels_of(run, base, dataset, Path(out), int(annotations), disputed)
                asked = np.setdiff1d(pool.training_set()[0], parts.initial)
                known = [id for id in dataset.ids[asked].tolist() if id in people]
                agreed, lesion = np.mean([people[id] for id in known]), np.mean(dataset.masks(asked)) * 100
                rows.append((len(asked), len(known), len(disputed.intersection(known)), agreed, lesion))
            print("| {} | {:.0f} | {:.1f} | {:.1f} | {:.3f} | {:.1f} |".format(arm, *np.mean(rows, 0)))


if __name__ == "__main__":
    run_command(main)
