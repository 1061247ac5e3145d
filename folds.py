"""Trials over folds by origin: each network is trained on all folds but one and measured on the one left out.

    python folds.py --preset best --trial baseline                              # five networks, one for each fold
    python folds.py --preset best --trial longer --initial-steps 26000 --folds slides,bar
    python folds.py --trial baseline --measure isic2017 --tta --largest         # with predict.py and its options
    python folds.py --report

The folds are in OUT/folds.csv (`id, fold`). The options of train.py apply to all networks of a trial. An interrupted
trial continues with the same command. OUT/TRIAL/FOLD/ keeps settings and metrics, runs/OUT/ the weights, in half
precision. Images of no fold, such as the test images of the default split, are never read.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import ceal
from config import read_config
from data import Dataset
from experiment import as_written, different_setting, recorded_data, write_table
from pictures import find_pairs
from predict import mean_intervals
from process import outlasting_output, stopped_at_once
from run_folder import begin, locked
from utils import UserError, read_csv, run_command, whole_file, whole_folder

KEPT = "config.json", "environment.json", "final/history.csv", "final/test.csv"  # in a record, of a fold's run
MEASURED = "-measured"  # in the name of a trial of `measure`
OWN = "--run", "--initial", "--pool", "--test", "--validation", "--iterations", "--final-steps", "--force", "--oracle"


def read_folds(out):
    """OUT/folds.csv: a dict of fold to a list of ids. Raises UserError if it is not such a file."""
    path, folds = out / "folds.csv", {}
    if not path.exists():
        raise UserError(f"{path} is missing: write one, with the columns id and fold, or give another --out")
    with as_written(path):
        for row in read_csv(path):
            folds.setdefault(row["fold"], []).append(row["id"])
    if wrong := [fold for fold in folds if not re.fullmatch(r"\w[\w.-]*", fold or "")]:
        raise UserError(f"{path}: {wrong[0] or ''!r} is no name of a fold; use letters, digits, - and _ in each row")
    counts = Counter(id for fold in folds.values() for id in fold)
    if twice := [id for id, count in counts.items() if count > 1]:
        raise UserError(f"{path}: {twice[0]} is there twice; each image must have one fold")
    if len(folds) < 2:
        raise UserError(f"{path}: has {len(folds)} folds; it must have at least two")
    return folds


# -------------------------------------------------------------------------------------------------------- the networks


def train_fold(options, trial, fold, folds, out):
    """Train a network on all other folds and measure it on this one, if that is not done yet: OUT/TRIAL/FOLD."""
    record, work = out / trial / fold, Path("runs") / out.name / f"{trial}-{fold}"
    count = sum(map(len, folds.values())) - len(folds[fold])
    own = {"run": work, "initial": count, "pool": 0, "test": len(folds[fold]), "iterations": 0}
    config = read_config([*options, *(f"--{name}={value}" for name, value in own.items())])
    with Dataset(config.data) as dataset:
        check_trial(config, dataset, out / trial, folds)
        if not record.exists():
            with locked(work):
                train = positions_of([id for name in folds for id in folds[name] if name != fold], dataset)
                train_network(config, dataset, train, positions_of(folds[fold], dataset))
                with whole_folder(record) as folder:
                    for name in KEPT:
                        shutil.copy(work / name, folder)
    shutil.rmtree(work, ignore_errors=True)
    jaccard = float(read_csv(record / "history.csv")[0]["jaccard"])
    print(f"{record}: Jaccard {jaccard:.4f}; weights: {work}.weights.h5", flush=True)


def train_network(config, dataset, train, test):
    """Train on the positions `train` in config.run, measure on `test`, and keep the weights beside the run's folder."""
    from devices import about_tensorflow, tensorflow_errors  # here, because TensorFlow takes seconds to import
    from final import train_final
    from trainer import prepare
    from unet import load_unet, save_unet

    prepare(config)
    pool, steps = ceal.Pool(train, dataset.masks(train), np.array([], int), test), config.training_steps(len(train), 0)
    about = begin(config, dataset, Path(config.run), about_tensorflow(), train)
    with tensorflow_errors():
        train_final(config, dataset, about["normalisation"], pool, 0, steps, about.get("gpu_memory"))
        model, settings = load_unet(f"{config.run}/final/model.weights.h5")
        save_unet(model, f"{config.run}.weights.h5", settings["mean"], settings["std"], dtype="float16")


def positions_of(ids, dataset):
    """The sorted positions of these ids, int (n,). Raises UserError if one is not there, or has no mask."""
    place = {id: n for n, id in enumerate(dataset.ids) if dataset.has_mask[n]}
    if missing := [id for id in ids if id not in place]:
        raise UserError(f"{dataset.path}: {missing[0]} is not there or has no mask, and folds.csv names it")
    return np.sort([place[id] for id in ids])


def check_trial(config, dataset, trial, folds):
    """Raise UserError if a finished fold of the trial was trained with other settings, data or folds."""
    total = sum(map(len, folds.values()))
    for record in (path.parent for path in trial.glob("[!.]*/config.json")):
        with as_written(record):
            trained = json.loads((record / "config.json").read_text())["initial"]
            different = different_setting(record / "config.json", config, {"initial", "test", "preset"})
            same_data = recorded_data(record) == dataset.fingerprint()
        if not same_data:
            raise UserError(f"{dataset.path}: {record} was trained on other data; give another --trial")
        if different:
            raise UserError(f"{record} was trained with {different}; give another --trial")
        if trained != total - len(folds.get(record.name, ())):
            raise UserError(f"{record}: folds.csv was another one when it was trained; give another --trial")


def measure(source, options, trial, fold, ids, out):
    """Measure a trained network with predict.py at the images' own size: OUT/TRIAL-measured-OPTIONS/FOLD/test.csv. It
    is done if this is newer than the weights."""
    weights, how = Path("runs") / out.name / f"{trial}-{fold}.weights.h5", [option.lstrip("-") for option in options]
    record = out / re.sub(r"[^\w.-]", "-", "-".join([trial + MEASURED, *how])) / fold
    if record.exists():
        if weights.exists() and record.stat().st_mtime < weights.stat().st_mtime:
            shutil.rmtree(record)
        else:
            print(f"{record} is there already", flush=True)
            return
    pairs = {pair.id: pair for pair in find_pairs(source)[0]}
    if missing := [id for id in ids if id not in pairs]:
        raise UserError(f"{source}: {missing[0]} is not there, and folds.csv names it")
    pairs, predict = [pairs[id] for id in ids], str(Path(__file__).with_name("predict.py"))
    with tempfile.TemporaryDirectory() as masks:
        images = [str(pair.image) for pair in pairs]
        given = "--weights", str(weights), "--truth", str(Path(pairs[0].mask).parent), "--out", masks
        if subprocess.run([sys.executable, predict, *images, *given, *options]).returncode:
            raise UserError(f"{weights}: could not be measured, as predict.py says above")
        with whole_folder(record) as folder:
            shutil.copy(Path(masks, "metrics.csv"), folder / "test.csv")


# ---------------------------------------------------------------------------------------------------------- the report


def read_trials(out, folds):
    """The finished folds of all trials: a dict of trial to a dict of fold to a dict of id to (Jaccard, Dice)."""
    trials = {}
    for path in sorted(out.glob("[!.]*/[!.]*/test.csv")):
        trial, fold = path.parts[-3:-1]
        with as_written(path):
            rows = {row["id"]: (float(row["jaccard"]), float(row["dice"])) for row in read_csv(path)}
        if rows.keys() != set(folds.get(fold, ())):
            raise UserError(f"{path}: does not have the images of a fold {fold} of {out}/folds.csv; move it away")
        trials.setdefault(trial, {})[fold] = rows
    if not trials:
        raise UserError(f"{out} holds no finished fold; leave out --report to train")
    return trials


def summarise(found, baseline):
    """A row of the table, a dict. found: a dict of fold to a dict of id to (Jaccard, Dice); baseline: another one."""
    jaccard, dice = np.array([values for rows in found.values() for values in rows.values()]).T
    of_folds = {fold: float(np.mean([j for j, _ in rows.values()])) for fold, rows in found.items()}
    row = {"folds": len(found), "images": len(jaccard), "jaccard": float(jaccard.mean()), "dice": float(dice.mean())}
    row |= {"nothing_right": int((jaccard == 0).sum()), "mean_of_folds": float(np.mean(list(of_folds.values())))}
    worst = min(of_folds, key=of_folds.get)
    row |= {"worst_fold": f"{worst} {of_folds[worst]:.4f}"}
    row |= {f"jaccard_{fold}": value for fold, value in of_folds.items()}
    common = [fold for fold in found if fold in baseline and found is not baseline]
    less = {fold: np.array([found[fold][id][0] - baseline[fold][id][0] for id in found[fold]]) for fold in common}
    if less:
        for name, differences in {"jaccard": np.concatenate(list(less.values())), **less}.items():
            row[f"{name}_less_baseline"] = tuple(float(value[0]) for value in mean_intervals(differences[None]))
    return row


def report(out, folds, baseline):
    """Write table.md and table.json: a row for each trial, and its Jaccard less that of the trial `baseline`, with a
    95 % interval over the images that both have. A trial of `measure` is compared with `baseline` measured likewise."""
    trials = read_trials(out, folds)

    def baseline_of(name):
        how = name[name.find(MEASURED) :] if MEASURED in name and MEASURED not in baseline else ""
        return trials.get(baseline + how, {})

    rows = [{"trial": name, **summarise(found, baseline_of(name))} for name, found in trials.items()]
    header = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    write_table(out / "table.md", header, rows)
    with whole_file(out / "table.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    print((out / "table.md").read_text())


@outlasting_output()
def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="results/folds", type=Path, metavar="DIR", help="where folds.csv is (default %(default)s)")
    add("--trial", metavar="NAME", help="the trial's name")
    add("--folds", metavar="FOLD,...", help="leave out only these folds (default: each one)")
    add("--measure", type=Path, metavar="DIR", help="measure a finished trial on the challenge's folders")
    add("--report", action="store_true", help="train nothing; report the finished folds of all trials")
    add("--baseline", default="baseline", metavar="NAME", help="trial that others are compared with (default baseline)")
    args, rest = parser.parse_known_args()
    folds = read_folds(args.out)
    chosen = args.folds.split(",") if args.folds else list(folds)
    if unknown := [fold for fold in chosen if fold not in folds]:
        raise UserError(f"--folds {unknown[0]}: not one of {', '.join(folds)}")
    if args.report:
        return report(args.out, folds, args.baseline)
    if not re.fullmatch(r"\w[\w.-]*", args.trial or ""):
        raise UserError(f"--trial {args.trial}: give the trial a name of letters, digits, dots and hyphens")
    if args.measure:
        for fold in chosen:
            measure(args.measure, rest, args.trial, fold, folds[fold], args.out)
        return report(args.out, folds, args.baseline)
    if own := [option for option in rest if option.partition("=")[0] in OWN]:
        raise UserError(f"{own[0]}: each fold has its own; leave it out")
    with stopped_at_once(lambda: "go on with the same command"):
        for fold in chosen:
            train_fold(rest, args.trial, fold, folds, args.out)


if __name__ == "__main__":
    run_command(main)
