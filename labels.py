"""What a label is worth: a network trained anew, in the same way, on each set of labels that a strategy chose.

    python reproduce.py --preset quick --out results/labels --regimes scarce --arms ceal --seeds 5
    python labels.py --preset quick --out results/labels --arms ceal,random --seeds 1-5 --at 100,205,415
    python labels.py --preset quick --out results/labels --report
    python labels.py --preset quick --out results/choice --arms undisputed,strata,random --seeds 1-3 --validation 300

The label sets follow from the records of reproduce.py; an arm that uses no scores needs no record. Each network is
trained for as many steps as the arm `full`. The options of train.py apply to all: with --validation 300, given to
reproduce.py too, 300 labelled images take the place of the test images. Finished networks are kept, without weights, in
OUT/final/; the same command continues an interrupted training.

Mixtures of label sets are arms too: ceal+random takes the queries of both in turn, in the order in which they were
asked, and ceal-disputed leaves out the queries that two people draw differently, by the file of --agreement. The
Dice of ceal-disputed is compared with that of ceal, of other arms with that of random or random_start.
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
from agreement import disputed_images, read_agreement
from audit import draw_audit
from data import Dataset, normalisation, split_of_run
from experiment import (
    ARMS,
    FULL,
    PLACE,
    REGIMES,
    Run,
    as_written,
    configure,
    different_setting,
    read_base,
    recorded_data,
)
from process import outlasting_output, stopped_at_once
from run_folder import environment, locked, write_json
from strategies import STRATEGIES, select
from utils import UserError, derived_seed, read_csv, run_command, whole_file, whole_folder

WITHOUT = "-disputed"  # at the end of an arm's name: without the queries that people draw differently
SINGLE_DICE, SINGLE_DIFFERENCES = SINGLE = "dice_of_seeds", "differences_of_seeds"  # in labels.json alone
BASELINE = {"typical_start": "random_start", "random_start": "random_start"}  # subtracted in place of `random`


def steps_of_full(base):
    """The training steps of the arm `full`."""
    return configure(Run(REGIMES[0], "full", 1), base).initial_steps


# ------------------------------------------------------------------------------------------------------ sets of labels


def labels_of(run, base, dataset, out, annotations, disputed=()):
    """The Config, data.Split and ceal.Pool of an arm when it had this number of annotations, and the iteration.

    disputed: ids that a mixture leaves out. Raises UserError if this is not known, or if it never had this number."""
    (first, *others), without = parts_of(run.arm)
    if any(ARMS[arm].get("start") != ARMS[first].get("start") for arm in others):
        raise UserError(f"--arms {run.arm}: their first labels differ; mix arms that begin with the same ones")
    config = configure(run._replace(arm=first), base)
    parts = split_of_run(config, dataset)
    if others or without:
        return config, parts, *mixed_labels(run, base, dataset, parts, out, annotations, disputed)
    return config, parts, *labels_after(run, config, dataset, parts, out, annotations)


def labels_after(run, config, dataset, parts, out, annotations):
    """As `labels_of`, of a single arm: the ceal.Pool and the iteration."""
    pool, iteration = first_pool(dataset, parts), 0
    if pool.annotations == annotations:
        return pool, 0
    for iteration, positions in enumerate(queries_of(run, config, dataset, parts, out), 1):
        if pool.annotations >= annotations:
            iteration -= 1
            break
        pool.annotate(positions, dataset.masks(positions))
    if pool.annotations != annotations:
        raise UserError(f"--at {annotations}: {run.name} never has this number of labels; nearest: {pool.annotations}")
    return pool, iteration


def mixed_labels(run, base, dataset, parts, out, annotations, disputed):
    """As `labels_after`, of an arm such as ceal+random, or ceal-disputed. disputed: the ids that are left out then."""
    arms, without = parts_of(run.arm)
    orders = []
    for arm in arms:
        single = run._replace(arm=arm)
        orders.append(np.concatenate(list(queries_of(single, configure(single, base), dataset, parts, out))))
    taken = {position: None for turn in zip(*orders) for position in turn}  # a dict keeps the order
    chosen = [n for n in map(int, taken) if not (without and dataset.ids[n] in disputed)]
    pool = first_pool(dataset, parts)
    count = annotations - pool.annotations
    if not 0 <= count <= len(chosen):
        most = pool.annotations + len(chosen)
        raise UserError(f"--at {annotations}: {run.name} has from {pool.annotations} to {most} labels")
    pool.annotate(np.array(chosen[:count], int), dataset.masks(chosen[:count]))
    return pool, base.iterations


def parts_of(arm):
    """The arms that a mixture names, a list of str, and whether it leaves out disputed images."""
    return arm.removesuffix(WITHOUT).split("+"), arm.endswith(WITHOUT)


def first_pool(dataset, parts):
    """The ceal.Pool of a run before its first query."""
    return ceal.Pool(parts.initial, dataset.masks(parts.initial), parts.pool, parts.test)


def queries_of(run, config, dataset, parts, out):
    """Yield the positions that a run asked for in each iteration. Raises UserError if they are not known, or if the run
    had other settings (but for the precision) or data."""
    if unscored(config):
        yield from drawn_queries(config, parts.pool)
        return
    record, place = out / "records" / run.name, {id: n for n, id in enumerate(dataset.ids)}
    with as_written(record):
        if not (queries := experiment.recorded_queries(record)):
            raise UserError(f"{record} does not have the run's queries: do this run with reproduce.py first")
        different = different_setting(record / "config.json", config, ["precision"])
        if recorded_data(record) != dataset.fingerprint():
            different = "another --data"
    if different:
        raise UserError(f"{record} was made with {different}: give the settings of the records, or another --out")
    for iteration in range(1, max(queries) + 1):
        asked = queries.get(iteration, {}).items()
        yield np.array([place[id] for id, group in asked if group != "pseudo"], int)


def unscored(config):
    """Whether the queries of a run do not depend on its networks."""
    return not STRATEGIES[config.query].scored


def drawn_queries(config, unlabelled):
    """Yield the positions that train.py asks for in each iteration, for a strategy without scores. unlabelled: those in
    the pool at first."""
    for iteration in range(1, config.iterations + 1):
        audited = draw_audit(unlabelled, config, iteration)
        unlabelled = np.setdiff1d(unlabelled, audited)
        rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
        groups = select(np.zeros(len(unlabelled)), rng, config, {"iteration": iteration})
        positions = unlabelled[np.concatenate(list(groups.values()))]
        unlabelled = np.setdiff1d(unlabelled, positions)
        yield np.concatenate([positions, audited])


# -------------------------------------------------------------------------------------------------------- the networks


def train_all(wanted, base, out, disputed):
    """Train all networks. wanted: a list of (Run, number of annotations); the rest as for `train_on_labels`."""
    from devices import tensorflow_errors  # here, because TensorFlow takes seconds to import
    from trainer import prepare

    prepare(base)
    with Dataset(base.data) as dataset, tensorflow_errors():
        for run, annotations in wanted:
            train_on_labels(run, base, dataset, out, annotations, disputed)


def train_on_labels(run, base, dataset, out, annotations, disputed=()):
    """Train a network on these labels into OUT/final/NAME-ANNOTATIONS. disputed: ids that a mixture leaves out.

    If it is there already, this is checked. Raises UserError if it had other settings, data or labels."""
    from devices import about_tensorflow  # here, because TensorFlow takes seconds to import
    from final import digest, train_final

    place = out / "final" / f"{run.name}-{annotations}"
    config, parts, pool, iteration = labels_of(run, base, dataset, out, annotations, disputed)
    if place.exists():
        with as_written(place):
            different = different_setting(place / "run.json", config)
            same_data = json.loads((place / "run.json").read_text())["data_fingerprint"] == dataset.fingerprint()
            labels = json.loads((place / "config.json").read_text())["labels"]
        if different or not same_data or labels != digest(*pool.training_set()):
            raise UserError(f"{place} was made with {different or 'other labels'}: give another --out")
        return
    work = Path("runs") / out.name / f"final-{run.name}-{annotations}"
    config = dataclasses.replace(config, run=str(work))
    mean_and_std = normalisation(dataset, np.concatenate([parts.initial, parts.pool]))
    about = about_tensorflow()
    with locked(work):
        train_final(config, dataset, mean_and_std, pool, iteration, steps_of_full(base), about.get("gpu_memory"))
        with whole_folder(place) as folder:
            for name in "config.json", "history.csv", "test.csv":
                shutil.copy(work / "final" / name, folder)
            settings = {**dataclasses.asdict(config), "run": None, "data_fingerprint": dataset.fingerprint()}
            write_json(folder / "run.json", settings)
            write_json(folder / "environment.json", environment(about))
    shutil.rmtree(work)
    print(f"{place.name}: Dice {float(read_csv(place / 'history.csv')[0]['dice']):.4f}", flush=True)


# ---------------------------------------------------------------------------------------------------------- the report


def read_finals(out):
    """The Dice of each test image by all finished networks: a dict of (regime, arm, annotations) to a dict of seed to
    float64 (N,). Raises UserError if two of them differ in a setting that arms, regimes and seeds have in common."""
    found, settings = {}, {}
    changed = {name for changes in ARMS.values() for name in changes}  # and by `configure`:
    free = {*PLACE, *changed, "seed", "initial_seed", "initial", "pool", "most_uncertain"}
    for folder in sorted((out / "final").glob("[!.]*-*")):
        with as_written(folder):
            stored = json.loads((folder / "run.json").read_text())
            stored["steps"] = json.loads((folder / "config.json").read_text())["steps"]
            for name in stored.keys() - free:
                value, first = settings.setdefault(name, (stored[name], folder))
                if value != stored[name]:
                    raise UserError(f"{first} and {folder} differ in {name}: give each its own --out")
            name, seed, annotations = folder.name.rsplit("-", 2)
            regime, arm = name.split("-", 1)
            dice = np.array([float(row["dice"]) for row in read_csv(folder / "test.csv")])
        found.setdefault((regime, arm, int(annotations)), {})[int(seed)] = dice
    if not found:
        raise UserError(f"{out}/final holds no finished network; leave out --report to train them")
    return found


def baseline_of(arm):
    """The arm that is subtracted: the same one with its disputed images, random first labels, or `random`."""
    return arm.removesuffix(WITHOUT) if arm.endswith(WITHOUT) else BASELINE.get(arm, "random")


def summarise(found, full):
    """The rows of the table, a list of dict. found: as from `read_finals`; full: the Dice with all labels, or None."""
    rows = []
    for (regime, arm, annotations), seeds in sorted(found.items()):
        means = [dice.mean() for dice in seeds.values()]
        less = baseline_of(arm)
        baseline = found.get((regime, less, annotations), {})
        common = sorted(seeds.keys() & baseline.keys()) if arm != less else []
        row = {"regime": regime, "arm": arm, "labels": annotations, "seeds": len(means), "dice": float(np.mean(means))}
        row["share_of_full"] = row["dice"] / full if full else None
        row[SINGLE_DICE] = {seed: float(dice.mean()) for seed, dice in sorted(seeds.items())}
        if len(common) > 1:
            differences = np.stack([seeds[seed] - baseline[seed] for seed in common])
            row |= {"baseline": less, "common_seeds": len(common)}
            row[SINGLE_DIFFERENCES] = dict(zip(common, differences.mean(1).tolist()))
            row["less_baseline"] = float(differences.mean()), *experiment.interval(differences)
            row["over_seeds"] = float(differences.mean()), *experiment.interval_over_seeds(differences)
        rows.append(row)
    return rows


def report(out, records):
    """Write labels.md, labels.json and figures/labels.png. records: a folder with records of the arm `full`, if any."""
    found, full = read_finals(out), None
    if (runs := experiment.read_records(records)) and (
        all_labels := [v for (_, arm), v in runs.items() if arm == "full"]
    ):
        full = float(np.mean([run["dice"][-1] for run in all_labels[0].values()]))
    rows = summarise(found, full)
    header = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in SINGLE]
    experiment.write_table(out / "labels.md", header, rows)
    with whole_file(out / "labels.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    (out / "figures").mkdir(exist_ok=True)
    drawn = [
        (
            f"{row['arm']}, {row['labels']} labels, {row['regime']} regime"
            + (f"; baseline: {row['baseline']}" if "baseline" in row else ""),
            list(row[SINGLE_DICE].values()),
            list(row.get(SINGLE_DIFFERENCES, {}).values()),
            row.get("less_baseline"),
        )
        for row in sorted(rows, key=lambda row: (row["regime"], row["labels"], row["arm"]))
    ]
    figures.figure_label_sets(drawn, out / "figures" / "labels.png")
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
    parser.add_argument(
        "--agreement",
        type=Path,
        metavar="FILE",
        help="as for agreement.py, for arms such as ceal-disputed",
    )
    parser.add_argument("--report", action="store_true", help="train nothing; report the finished networks")
    args, rest = parser.parse_known_args()
    base, arms = read_base(rest), args.arms.split(",")
    named = {part for arm in arms for part in parts_of(arm)[0]}
    if unknown := sorted(named - set(ARMS) | named & set(FULL)):
        raise UserError(f"--arms {unknown[0]}: not an arm that chooses labels")
    if args.agreement is None and (without := [arm for arm in arms if parts_of(arm)[1]]):
        raise UserError(f"--arms {without[0]}: give --agreement, the file that says what two people draw differently")
    disputed = args.agreement and disputed_images(read_agreement(args.agreement))
    try:
        seeds, at = experiment.read_seeds(args.seeds), [int(number) for number in args.at.split(",")]
    except ValueError:
        raise UserError(f"--seeds {args.seeds}, --at {args.at}: must be numbers, such as 1-5 and 205,415")
    if not args.report:
        wanted = [(Run(args.regime, arm, seed), labels) for seed in seeds for labels in at for arm in arms]
        with stopped_at_once(lambda: "go on with the same command"):
            train_all(wanted, base, args.out, disputed)
    report(args.out, args.full or args.out)


if __name__ == "__main__":
    run_command(main)
