"""What people agree on: how alike two specialists draw the images that each strategy asks for.

    python agreement.py human_agreement.csv results/quick

The csv file has the columns `id` and `dice`, the mean Dice of the masks that two people have drawn of an image. The
queries come from the records of reproduce.py. Writes agreement.md and agreement.json beside them. An arm without scores
is reported if another one began with the same first labels, because the images of its pool are known from that one.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

import experiment
from config import Config
from experiment import FULL, Run
from figures import GROUPS
from utils import UserError, in_one_line, read_csv, run_command, whole_file

DISPUTED = 0.7  # an image is disputed if the masks of two people have a lower Dice
RESAMPLES = 4000


def read_agreement(path):
    """A dict of id to the mean Dice of two people's masks. Raises UserError if the file is not as described above."""
    try:
        found = {row["id"]: float(row["dice"]) for row in read_csv(path)}
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a csv file with the columns id and dice ({in_one_line(error)})")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a csv file with the columns id and dice")
    if not found or not all(0 <= dice <= 1 for dice in found.values()):
        raise UserError(f"{path}: the column dice must have numbers from 0 to 1 in at least one row")
    return found


def disputed_images(agreement):
    """The ids of the images of which two people's masks differ. agreement: as from `read_agreement`."""
    return {id for id, dice in agreement.items() if dice < DISPUTED}


def first_labels(folder):
    """The settings of a record's run on which the images of its first pool depend, a tuple."""
    stored = json.loads((folder / "config.json").read_text())
    return tuple(stored.get(name, getattr(Config, name)) for name in ("initial", "start", "initial_seed"))


def pool_images(out):
    """The ids of the pools, as far as the records have scores: a dict of `first_labels` to a set."""
    pools = {}
    for folder in experiment.record_folders(out):
        with experiment.as_written(folder):
            if ids := {id for pool in experiment.read_pools(folder).values() for id in pool["id"].tolist()}:
                pools.setdefault(first_labels(folder), set()).update(ids)
    return pools


def asked_and_others(folder, ids, pool):
    """Which of these ids a record's run asked for: a dict of iteration to (a dict of group to bool (N,), the images
    that were in the pool then, bool (N,)). pool: the ids of the first pool."""
    others, found = np.array([id in pool for id in ids], bool), {}
    for iteration, groups in experiment.recorded_queries(folder).items():
        of = {group: np.array([groups.get(id) == group for id in ids], bool) for group in GROUPS}
        found[iteration] = of, others.copy()
        others &= ~np.any([chosen for group, chosen in of.items() if group != "pseudo"], 0)
    return found


def difference(asked, others, dice):
    """The mean agreement over the images asked for, and how much it is above that over the others, with its 95 %
    bootstrap interval over seeds and images: (mean, (difference, low, high)).

    asked, others: how often each image counts, (seed, N); dice: the people's agreement, (N,)."""
    rng, (seeds, images) = np.random.default_rng(0), asked.shape
    some_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    some_images = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES)

    def mean(counts, seeds, images):
        weights = (seeds @ counts) * images
        count = weights.sum(-1)
        return np.where(count > 0, weights @ dice / np.maximum(count, 1), np.nan)

    def less(*resampled):
        return mean(asked, *resampled) - mean(others, *resampled)

    whole = np.ones(seeds), np.ones(images)
    low, high = np.nanquantile(less(some_seeds, some_images), [0.025, 0.975])
    return float(mean(asked, *whole)), (float(less(*whole)), float(low), float(high))


def table(out, agreement, pools):
    """The rows of the table, a list of dict: for each arm of the records that have queries and whose pool is known, by
    group over all iterations, and by iteration over all groups that a person is asked for."""
    ids, dice = list(agreement), np.array(list(agreement.values()))
    runs = {}
    for folder in experiment.record_folders(out):
        run = Run.named(folder.name)
        with experiment.as_written(folder):
            if json.loads((folder / "config.json").read_text()).get("validation"):
                raise UserError(f"{folder}: made with --validation, so its test images would count; use a run without")
            pool = pools.get(first_labels(folder))
            if run.arm not in FULL and pool and (found := asked_and_others(folder, ids, pool)):
                runs.setdefault((run.regime, run.arm), []).append(found)
    rows = []
    for (regime, arm), seeds in runs.items():
        iterations = sorted(set.intersection(*(set(found) for found in seeds)))
        asked = [group for group in GROUPS if group != "pseudo"]
        cases = [("all", asked, iterations), *((group, [group], iterations) for group in GROUPS)]
        cases += [("all", asked, [iteration]) for iteration in iterations]
        for name, groups, some in cases:
            counts = np.array([sum(found[k][0][group] for k in some for group in groups) for found in seeds], int)
            others = np.array([sum(found[k][1].astype(int) for k in some) for found in seeds])
            if counts.any():
                mean, less = difference(counts, others, dice)
                row = {"regime": regime, "arm": arm, "seeds": len(seeds), "group": name}
                row["iteration"] = some[0] if len(some) == 1 else f"{some[0]} to {some[-1]}"
                rows.append(row | {"images": int(counts.sum()), "agreement": mean, "less_others": less})
    return rows


def report(out, agreement):
    """Write agreement.md and agreement.json, and print the table. Raises UserError if no record has scores, or none
    asked for one of these images."""
    if not (pools := pool_images(out)):
        raise UserError(f"{out}: no record with scores; do runs with reproduce.py first, such as those of ceal")
    in_a_pool = set().union(*pools.values())
    if not (rows := table(out, {id: dice for id, dice in agreement.items() if id in in_a_pool}, pools)):
        raise UserError(f"{out}: asked for none of the csv file's images; are their ids those of the data file?")
    known = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    experiment.write_table(out / "agreement.md", list(rows[0]), known)
    with whole_file(out / "agreement.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    print((out / "agreement.md").read_text())
    print("images: those asked for of which two people's masks are known; less others: less the images of the pool,")
    print("with the 95 % interval over seeds and images. Several people drew harder images more often, so that all")
    print("means are below those of the whole pool.")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agreement", type=Path, metavar="CSV", help="the columns id and dice, of two people's masks")
    parser.add_argument("out", type=Path, metavar="DIR", help="the folder of reproduce.py's records")
    args = parser.parse_args()
    report(args.out, read_agreement(args.agreement))


if __name__ == "__main__":
    run_command(main)
