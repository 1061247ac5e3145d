"""What a label is worth: a network trained anew, in the same way, on each set of labels that a strategy chose.

    python reproduce.py --preset quick --out results/labels --regimes scarce --arms ceal --seeds 5
    python labels.py --preset quick --out results/labels --arms ceal,random --seeds 5 --at 100,205,415
    python labels.py --preset quick --out results/labels --report

The label sets follow from the records of reproduce.py; an arm that uses no scores needs no record. Each network is
trained for as many steps as the arm `full`. The options of train.py apply to all. Finished networks are kept, without
weights, in OUT/final/; the same command continues an interrupted training.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

import ceal
import experiment
import figures
from config import read_config
from data import Dataset, normalisation, split
from experiment import ARMS, FULL, REGIMES, STYLES, Run, configure
from process import outlasting_output
from strategies import STRATEGIES
from utils import UserError, derived_seed, read_csv, run_command, whole_file, whole_folder


def steps_of_full(base):
    """The training steps of the arm `full`."""
    return configure(Run(REGIMES[0], "full", 1), base).initial_steps


# ------------------------------------------------------------------------------------------------------ sets of labels


def labels_after(run, config, dataset, parts, out, annotations):
    """The ceal.Pool of a run when it had this number of annotations, and the iteration. Raises UserError if its queries
    are not known, or if it never had this number."""
    pool = ceal.Pool(parts.initial, dataset.masks(parts.initial), parts.pool, parts.test)
    queries = drawn_queries(config, pool) if unscored(config) else recorded_queries(out / "records" / run.name)
    place, iteration = {id: n for n, id in enumerate(dataset.ids)}, 0
    while pool.annotations < annotations and iteration < config.iterations:
        iteration += 1
        positions = np.array(queries(iteration) if unscored(config) else [place[id] for id in queries[iteration]], int)
        pool.annotate(positions, dataset.masks(positions))
    if pool.annotations != annotations:
        raise UserError(f"--at {annotations}: {run.name} never has this number of labels; nearest: {pool.annotations}")
    return pool, iteration


def unscored(config):
    """Whether the queries of a run do not depend on its networks."""
    return not STRATEGIES[config.query].scored


def drawn_queries(config, pool):
    """A function from an iteration to the positions that train.py asks for in it, for a strategy without scores."""

    def draw(iteration):
        rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
        groups = STRATEGIES[config.query].select(np.zeros(len(pool.unlabelled)), rng, config)
        return pool.unlabelled[np.concatenate(list(groups.values()))]

    return draw


def recorded_queries(record):
    """A dict of iteration to the ids that a record's run asked for. Raises UserError if they were not kept."""
    if not (record / "queries.csv").exists():
        raise UserError(f"{record}/queries.csv is missing: do this run with reproduce.py first")
    queries = {}
    for row in read_csv(record / "queries.csv"):
        if row["group"] != "pseudo":
            queries.setdefault(int(row["iteration"]), []).append(row["id"])
    return queries


# -------------------------------------------------------------------------------------------------------- the networks


def train_on_labels(run, base, dataset, out, annotations):
    """Train a network on these labels, if it is not there yet, into OUT/final/NAME-ANNOTATIONS."""
    place = out / "final" / f"{run.name}-{annotations}"
    if place.exists():
        return
    from final import train_final  # here, because TensorFlow takes seconds to import

    config = configure(run, base)
    parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
    pool, iteration = labels_after(run, config, dataset, parts, out, annotations)
    work = Path("runs") / out.name / f"final-{run.name}-{annotations}"
    work.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, run=str(work))
    mean_and_std = normalisation(dataset, np.concatenate([parts.initial, parts.pool]))
    train_final(config, dataset, mean_and_std, pool, iteration, steps_of_full(base))
    with whole_folder(place) as folder:
        for name in "config.json", "history.csv", "test.csv":
            shutil.copy(work / "final" / name, folder)
        settings = {**dataclasses.asdict(config), "run": None, "data_fingerprint": dataset.fingerprint()}
        (folder / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(work)
    print(f"{place.name}: Dice {float(read_csv(place / 'history.csv')[0]['dice']):.4f}", flush=True)


# ---------------------------------------------------------------------------------------------------------- the report


def read_finals(out):
    """The Dice of each test image by all finished networks: a dict of (regime, arm, annotations) to a dict of seed to
    float64 (N,)."""
    found = {}
    for folder in sorted((out / "final").glob("[!.]*-*")):
        name, _, annotations = folder.name.rpartition("-")
        run = Run.named(name)
        with experiment.as_written(folder):
            dice = np.array([float(row["dice"]) for row in read_csv(folder / "test.csv")])
        found.setdefault((run.regime, run.arm, int(annotations)), {})[run.seed] = dice
    if not found:
        raise UserError(f"{out}/final holds no finished network; leave out --report to train them")
    return found


def summarise(found, full):
    """The rows of the table, a list of dict. found: as from `read_finals`; full: the Dice with all labels, or None."""
    rows = []
    for (regime, arm, annotations), seeds in sorted(found.items()):
        means = [dice.mean() for dice in seeds.values()]
        baseline = found.get((regime, "random", annotations), {})
        common = sorted(seeds.keys() & baseline.keys())
        row = {"regime": regime, "arm": arm, "labels": annotations, "seeds": len(means), "dice": float(np.mean(means))}
        row["share_of_full"] = row["dice"] / full if full else None
        if arm != "random" and len(common) > 1:
            differences = np.stack([seeds[seed] - baseline[seed] for seed in common])
            row["less_random"] = float(differences.mean()), *experiment.interval(differences)
            row["over_seeds"] = float(differences.mean()), *experiment.interval_over_seeds(differences)
        rows.append(row)
    return rows


def report(out, records):
    """Write labels.md, labels.json and figures/labels.png. records: a folder with records of the arm `full`, if any."""
    from reproduce import as_text

    found, full = read_finals(out), None
    if (runs := experiment.read_records(records)) and (
        all_labels := [v for (_, arm), v in runs.items() if arm == "full"]
    ):
        full = float(np.mean([run["dice"][-1] for run in all_labels[0].values()]))
    rows = summarise(found, full)
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[as_text(row.get(name)) for name in header] for row in rows]
    with whole_file(out / "labels.md") as partial:
        lines = [header, ["---"] * len(header), *cells]
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines).replace("_", " "))
    with whole_file(out / "labels.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    panels = {}
    for regime, arm in dict.fromkeys((row["regime"], row["arm"]) for row in rows):
        at = sorted(a for r, s, a in found if (r, s) == (regime, arm))
        means = [[dice.mean() for dice in found[regime, arm, a].values()] for a in at]
        spread = np.array([np.std(values, ddof=min(1, len(values) - 1)) for values in means])
        curve = figures.Curve(arm, STYLES[arm], np.array(at), np.array([np.mean(values) for values in means]), spread)
        panels.setdefault(f"{regime} regime, trained anew", []).append(curve)
    (out / "figures").mkdir(exist_ok=True)
    figures.figure_curves(panels, out / "figures" / "labels.png")
    print((out / "labels.md").read_text())


@outlasting_output()
def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder of reproduce.py's records")
    parser.add_argument("--regime", default=REGIMES[0], choices=REGIMES, help="default %(default)s")
    parser.add_argument("--arms", default="ceal,random", help="arms whose labels are used (default %(default)s)")
    parser.add_argument("--seeds", default="1-5", help="seeds, for instance 3 or 1-5 (default %(default)s)")
    parser.add_argument("--at", default="205,415", help="numbers of labels (default %(default)s)")
    parser.add_argument("--full", type=Path, metavar="DIR", help="a folder of reproduce.py with records of `full`")
    parser.add_argument("--report", action="store_true", help="train nothing; report the finished networks")
    args, rest = parser.parse_known_args()
    base, arms = read_config(rest), args.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS) | set(arms) & set(FULL)):
        raise UserError(f"--arms {unknown[0]}: not an arm that chooses labels")
    try:
        first, _, last = args.seeds.partition("-")
        seeds, at = range(int(first), int(last or first) + 1), [int(number) for number in args.at.split(",")]
    except ValueError:
        raise UserError(f"--seeds {args.seeds}, --at {args.at}: must be numbers, such as 1-5 and 205,415")
    if not args.report:
        with Dataset(base.data) as dataset:
            for seed in seeds:
                for annotations in at:
                    for arm in arms:
                        train_on_labels(Run(args.regime, arm, seed), base, dataset, args.out, annotations)
    report(args.out, args.full or args.out)


if __name__ == "__main__":
    run_command(main)
