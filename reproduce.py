"""The paper's experiment with its baselines over several seeds: tables, figures, and every number behind them.

    python reproduce.py --preset quick --out results/quick --regimes scarce --arms ceal,random,full --seeds 5
    python reproduce.py --preset quick --out results/quick --only ceal,3 --regimes scarce    # one run: for a job array
    python reproduce.py --preset quick --out results/quick --report            # from what is finished, without running

All options of train.py may be given too, for all runs, and the same ones each time: a record of other settings is
refused. Each run is one of train.py, in runs/OUT/, and goes on where it was if this is started again. What a finished
one has found is kept in OUT/records/; the report rests on the records alone.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap, spearmanr, ttest_1samp

import ceal
from data import Dataset
from train import Config, read_config
from utils import (
    GROUPS,
    UserError,
    cores,
    draw_histogram,
    draw_scores,
    in_one_line,
    progress_bar,
    read_csv,
    run_command,
    save_figure,
    whole_file,
    whole_folder,
    write_csv,
)

NO_PSEUDO = {"pseudo_first": 0, "pseudo_step": 0}
# What an arm changes of the preset, and how it is drawn.
ARMS = {
    "ceal": {},
    "no_pseudo": NO_PSEUDO,
    "no_distance": {"distance": "none"},
    "empty_only": {"no_detection_rule": "empty"},
    "power": {"query": "power"},
    "uncertain_only": {"no_detection": 0, "random": 0},  # most_uncertain: all of them
    "entropy": {"uncertainty": "entropy"},
    "bald": {"uncertainty": "bald"},
    "random": {"query": "uniform", **NO_PSEUDO},
    "random_pseudo": {"query": "uniform"},
    "no_queries": {"query": "none", **NO_PSEUDO},
    "full_in_stages": {"query": "none", **NO_PSEUDO},
    # The other rate, which nothing would use, is no difference between records.
    "full": {"iterations": 0, "active_learning_rate": 0.0},
}
FULL = "full_in_stages", "full"  # all labelled from the start, so that the regimes do not differ
# Settings in which runs that are compared may differ: where they were done, and what does not change a result.
PLACE = "run", "data", "devices", "deterministic"
LINES = ["k-o", "k--s", "b-^", "m-*", "c-h", "b--v", "g-D", "g--P", "r-x", "r--+", "y-.", "k-.", "k:"]
STYLES = dict(zip(ARMS, LINES, strict=True))
REGIMES = "scarce", "paper"
# The columns of a record's pool.csv: what `rate_pool` gives.
POOL = [
    "iteration",
    "pool",
    "correlation",
    "certain_and_poor",
    "most_uncertain_region",
    "certain_and_right",
    "uncertain_region",
    "dice_pool",
    *(f"dice_{group}" for group in GROUPS),
]
ARROW = {"arrowstyle": "->", "linewidth": 0.7}
FAILURE = 0.788  # the Dice at a Jaccard of 0.65, below which the challenge counts a mask as failed


# ------------------------------------------------------------------------------------------------------------ the runs


class Run(NamedTuple):
    regime: str
    arm: str
    seed: int

    @property
    def name(self):
        return f"{self.arm}-{self.seed}" if self.arm in FULL else f"{self.regime}-{self.arm}-{self.seed}"

    @classmethod
    def named(cls, name):
        """The run of this `name`; one of FULL in the first regime."""
        try:
            *regime, arm, seed = name.split("-")
            run = cls(*regime or REGIMES[:1], arm, int(seed))
        except (TypeError, ValueError):
            run = None
        if run is None or run.arm not in ARMS or run.regime not in REGIMES:
            raise UserError(f"{name}: no record of reproduce.py has such a name; move it out of records/")
        return run


def configure(run, base):
    """The run's train.Config, changed from that of all runs.

    All arms have the same test images, the same weights at first, the same optimizer steps; all but FULL and
    `no_queries` the same number of annotations. The scarce regime begins with a sixth of the labels.
    """
    labelled, half_way = base.initial + base.pool, base.initial + base.iterations * base.asked // 2
    initial_steps, active_steps = base.training_steps(base.initial, 0), base.training_steps(half_way, 1)
    initial = base.initial if run.regime == "paper" else base.initial // 6
    changes = dict(ARMS[run.arm])
    if run.arm in FULL:
        initial = labelled
    if run.arm == "full":
        initial_steps += base.iterations * active_steps
    if run.arm == "uncertain_only":
        changes["most_uncertain"] = base.asked
    steps = {"initial_steps": initial_steps, "active_steps": active_steps}
    return dataclasses.replace(base, seed=run.seed, initial=initial, pool=labelled - initial, **steps, **changes)


def common_iterations(run, other, base):
    """How many iterations two runs have in common, being the same up to there, bit for bit on a CPU."""
    if {*FULL} & {run.arm, other.arm} or run[::2] != other[::2] or run == other:
        return 0
    mine, theirs = (dataclasses.replace(configure(r, base), **NO_PSEUDO) for r in (run, other))
    return min(base.pseudo_start, base.iterations + 1) if mine == theirs else 1


def different_setting(run, folder, base):
    """The first setting in which the config.json in this folder is not that of the run, in words; None if none is."""
    stored, wanted = json.loads((folder / "config.json").read_text()), dataclasses.asdict(configure(run, base))
    for name in wanted:
        of_folder = stored.get(name, getattr(Config, name))  # a setting that is newer than the folder
        if of_folder != wanted[name] and name not in PLACE:
            return f"--{name.replace('_', '-')} {of_folder}, not {wanted[name]}"
    return None


def begin_from_another(run, folder, base):
    """Make the run's folder with the iterations that it has in common with another arm's run, if one has done them."""
    others = [run._replace(arm=arm) for arm in ARMS]
    shared = [(common_iterations(run, other, base), other) for other in others]
    for count, other in sorted(shared, reverse=True):
        source = folder.with_name(other.name)
        names = [f"iteration_{k:02d}" for k in range(count)]
        if folder.exists() or not count or not all((source / name).is_dir() for name in names):
            continue
        if different_setting(other, source, base):
            continue
        config = dataclasses.replace(configure(run, base), run=str(folder))
        with whole_folder(folder) as partial:
            for name in names:
                shutil.copytree(source / name, partial / name)
            for file in source.glob("synthetic.h5"):
                shutil.copy(file, partial)
            environment = {**json.loads((source / "environment.json").read_text()), "begun_by": other.name}
            for name, content in ("config", dataclasses.asdict(config)), ("environment", environment):
                (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def start(run, folder, base, threads):
    """A process of train.py that does this run, or goes on with it; its output goes to a log beside the folder."""
    config = dataclasses.replace(configure(run, base), run=str(folder))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(config).items()]
    command = [sys.executable, os.path.relpath(Path(__file__).with_name("train.py")), *options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": str(threads), "TF_NUM_INTEROP_THREADS": str(threads)}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def run_all(runs, out, base, jobs):
    """Do the runs that have no record yet, `jobs` at a time. Raises UserError if the data are not those of the records,
    and at the end if some failed."""
    waiting = [run for run in runs if not (out / "records" / run.name).exists()]
    if waiting:
        check_data(base.data, out)
    work, under_way, failed = Path("runs") / out.name, {}, []
    threads = os.environ.get("TF_NUM_INTRAOP_THREADS") or max(1, cores() // jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already; logs in {work}/", flush=True)
    try:
        with progress_bar() as progress:
            task = progress.add_task("runs", total=len(waiting))
            while waiting or under_way:
                while waiting and len(under_way) < jobs:
                    run = waiting.pop(0)
                    begin_from_another(run, work / run.name, base)
                    under_way[run] = start(run, work / run.name, base, threads)
                time.sleep(0.5)
                for run in [run for run, process in under_way.items() if process.poll() is not None]:
                    if under_way.pop(run).returncode:
                        failed.append(f"{work / run.name}.log")
                    else:
                        keep_record(run, work / run.name, out)
                        print_run(run, out)
                    progress.advance(task)
    finally:
        for process in under_way.values():
            process.terminate()
        for process in under_way.values():
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} runs failed; the ends of these logs say why: {', '.join(failed)}")


def print_run(run, out):
    """One line a person can follow."""
    last = read_csv(out / "records" / run.name / "history.csv")[-1]
    print(f"{run.name}: {last['annotations']} annotations, Dice {float(last['dice']):.4f}", flush=True)


# --------------------------------------------------------------------------------------------------------- the records


def keep_record(run, folder, out):
    """Put what a finished run has found, without weights and pictures, into OUT/records/."""
    with whole_folder(out / "records" / run.name) as record:
        for name in "config.json", "environment.json", "history.csv":
            shutil.copy(folder / name, record)
        with as_written(folder):
            iterations = [folder / f"iteration_{k:02d}" for k, _ in enumerate(read_csv(folder / "history.csv"))]
            tests = [read_csv(iteration / "test.csv") for iteration in iterations]
            rows = list(zip(*([round(float(row["dice"]), 4) for row in test] for test in tests), strict=True))
        header = ["id", *(iteration.name for iteration in iterations)]
        write_csv(record / "test_dice.csv", header, ((row["id"], *dice) for row, dice in zip(tests[0], rows)))
        scored = {k: iteration for k, iteration in enumerate(iterations) if (iteration / "scores.csv").exists()}
        if scored:
            pools = {k: read_pool(iteration) for k, iteration in scored.items()}
            edges = region_edges(pools[min(pools)]["score"])
            rows = [{"iteration": k, **rate_pool(pool, edges)} for k, pool in pools.items()]
            write_csv(record / "pool.csv", POOL, ([row[name] for name in POOL] for row in rows))
        if scored and run.arm == "ceal" and run.seed == 1:  # for the paper's figures
            for k, iteration in scored.items():
                pictures = ["examples.png"] if k in (min(scored), max(scored)) else []
                for name in "scores.csv", "queries.csv", *pictures:
                    shutil.copy(iteration / name, record / f"{iteration.name}_{name}")


def read_pool(folder):
    """scores.csv and queries.csv of an iteration: `score` and `dice`, float64 (n,), and `group`, str (n,), `` where an
    image was not chosen."""
    return join_pool(read_csv(folder / "scores.csv"), read_csv(folder / "queries.csv"))


def join_pool(scores, queries):
    """As `read_pool`, of rows that have been read."""
    groups = {row["id"]: row["group"] for row in queries}
    return {
        "score": np.array([float(row["uncertainty"]) for row in scores]),
        "dice": np.array([float(row["dice"]) for row in scores]),
        "group": np.array([groups.get(row["id"], "") for row in scores]),
    }


def region_edges(scores):
    """The two scores that part certain, uncertain and most uncertain images: those between which the random group
    lies."""
    return tuple(sorted(ceal.random_range(*ceal.histogram(scores)[2:])))


def rate_pool(pool, edges):
    """One iteration's pool: its size, the rank correlation of score and Dice, how many images lie in each of the
    paper's four regions, and the mean Dice of the whole and of each group (empty if the group is)."""
    low, high = edges
    score, dice = pool["score"], pool["dice"]
    certain, most = score < low, score >= high
    of_group = {name: dice[pool["group"] == name] for name in GROUPS}
    constant = np.ptp(score) == 0 or np.ptp(dice) == 0
    return {
        "pool": len(score),
        "correlation": "" if constant else round(float(spearmanr(score, dice).statistic), 4),
        "certain_and_poor": int((certain & (dice < FAILURE)).sum()),
        "most_uncertain_region": int(most.sum()),
        "certain_and_right": int((certain & (dice >= FAILURE)).sum()),
        "uncertain_region": int((~certain & ~most).sum()),
        "dice_pool": round(float(dice.mean()), 4),
        **{f"dice_{name}": round(float(values.mean()), 4) if len(values) else "" for name, values in of_group.items()},
    }


def check_records(out, base):
    """Raise UserError if a record is damaged or was made with other settings, or two with different data."""
    data = {}
    for folder in record_folders(out):
        with as_written(folder):
            different = different_setting(Run.named(folder.name), folder, base)
            data[recorded_data(folder)] = folder
        if different:
            raise UserError(f"{folder} was made with {different}: give the settings it was made with, or another --out")
    if len(data) > 1:
        raise UserError(f"{' and '.join(map(str, data.values()))} were made with different --data: give each its --out")


def check_data(path, out):
    """Raise UserError if the data file is none, or does not hold the images and masks of the records, if there are."""
    if path == "auto":
        return
    with Dataset(path) as dataset:
        if {recorded_data(folder) for folder in record_folders(out)} - {dataset.fingerprint()}:
            raise UserError(f"{path} does not hold the images and masks of {out}/records: give another --out")


def recorded_data(folder):
    """The fingerprint of the data that a record was made with."""
    return json.loads((folder / "environment.json").read_text())["data_fingerprint"]


def record_folders(out):
    """The folders of all records, without what a process is writing at the moment."""
    return sorted((out / "records").glob("[!.]*-*"))


@contextlib.contextmanager
def as_written(folder):
    """Name the record that turns out to be damaged, in a UserError."""
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not as this program wrote it ({in_one_line(error)}); move it away")


def read_pools(folder):
    """The pools of `read_pool` that a record keeps, a dict of iteration to pool."""
    pools = {}
    for file in sorted(folder.glob("iteration_*_scores.csv")):
        queries = file.with_name(file.name.replace("scores", "queries"))
        pools[int(file.name.split("_")[1])] = join_pool(read_csv(file), read_csv(queries))
    return pools


def read_record(folder):
    """What a run has found: a dict."""
    history, test = read_csv(folder / "history.csv"), read_csv(folder / "test_dice.csv")
    names = [name for name in test[0] if name != "id"]
    pool = read_csv(folder / "pool.csv") if (folder / "pool.csv").exists() else []
    record = {
        "annotations": [int(row["annotations"]) for row in history],
        "dice": [float(row["dice"]) for row in history],
        "jaccard": [float(row["jaccard"]) for row in history],
        "images": np.array([[float(row[name]) for name in names] for row in test]),  # (image, iteration)
        "pool": [{name: json.loads(row[name] or "null") for name in POOL} for row in pool],
        "pools": read_pools(folder),
    }
    if record["images"].shape[1] != len(history):
        raise ValueError(f"{len(history)} rows in history.csv, {len(names)} iterations in test_dice.csv")
    return record


def read_records(out):
    """All records: a dict of (regime, arm) to a dict of seed to `read_record`; those of FULL are in both regimes.

    In the order of REGIMES and ARMS."""
    found = {}
    for folder in record_folders(out):
        run = Run.named(folder.name)
        with as_written(folder):
            record = read_record(folder)
        for regime in REGIMES if run.arm in FULL else [run.regime]:
            found.setdefault((regime, run.arm), {})[run.seed] = record
    compared = {regime for regime, arm in found if arm not in FULL} or set(REGIMES)
    order = [(regime, arm) for regime in REGIMES if regime in compared for arm in ARMS]
    return {key: found[key] for key in order if key in found}


# ---------------------------------------------------------------------------------------------------------- statistics


def area(annotations, dice):
    """Mean height of the curve of Dice, (..., K), against annotations, (K,), or iterations where nobody is asked."""
    annotations = annotations if annotations[-1] > annotations[0] else range(len(annotations))
    return np.trapezoid(dice, annotations) / (annotations[-1] - annotations[0])


def interval(differences):
    """95 % bootstrap interval of the mean of (seed, image), seeds and images being drawn anew, each for itself.

    Their two scatters add up as they should; that of one seed's network on one image counts up to three times, so the
    interval is on the wide side (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007)."""
    seeds, images = map(np.arange, differences.shape)

    def mean(some_seeds, some_images, axis):
        return differences[some_seeds[..., :, None], some_images[..., None, :]].mean((-2, -1))

    options = {"n_resamples": 4000, "method": "percentile"}
    found = bootstrap((seeds, images), mean, rng=np.random.default_rng(0), **options)
    return tuple(map(float, found.confidence_interval))


def interval_over_seeds(differences):
    """95 % interval (Student's t) of the mean of (seed, image) over other seeds, for these images as they are."""
    return tuple(map(float, ttest_1samp(differences.mean(1), 0).confidence_interval()))


def against_random(runs, baseline, measure, interval_of=interval):
    """Mean of an arm's `measure`, record -> (image,), less that of `random`, over common seeds, and its 95 % interval;
    None if there are fewer than two."""
    seeds = sorted(runs.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    differences = np.stack([measure(runs[seed]) - measure(baseline[seed]) for seed in seeds])
    return float(differences.mean()), *interval_of(differences)


def last_dice(record):
    """Each test image's Dice at the end."""
    return record["images"][:, -1]


def mean_dice(record):
    """Each test image's Dice averaged along the curve; `area`."""
    return area(record["annotations"], record["images"])


def summarise(found):
    """The table: a dict per regime and arm."""
    rows = []
    for (regime, arm), runs in found.items():
        ends = np.array([run["dice"][-1] for run in runs.values()])
        row = {
            "regime": regime,
            "arm": arm,
            "seeds": len(runs),
            "annotations": max(r["annotations"][-1] for r in runs.values()),
        }
        row |= {"dice": ends.mean(), "dice_sd": ends.std(ddof=1) if len(ends) > 1 else None}
        row["jaccard"] = np.mean([run["jaccard"][-1] for run in runs.values()])
        full, baseline = found.get((regime, "full"), {}), found.get((regime, "random"), {})
        common = sorted(full.keys() & runs.keys())
        reference = np.mean([full[seed]["dice"][-1] for seed in common]) if common else None
        row["of_full"] = np.mean([runs[seed]["dice"][-1] for seed in common]) / reference if common else None
        if arm not in FULL:
            areas = np.array([area(run["annotations"], run["dice"]) for run in runs.values()])
            row |= {"area": areas.mean(), "area_sd": areas.std(ddof=1) if len(areas) > 1 else None}
            shared = {seed: runs[seed] for seed in common}
            row |= {f"annotations_to_{share}": needed(shared, share / 100, reference) for share in (95, 99)}
        if arm not in ("random", *FULL):
            row["dice_against_random"] = against_random(runs, baseline, last_dice)
            row["area_against_random"] = against_random(runs, baseline, mean_dice)
            row["area_on_these_images"] = against_random(runs, baseline, mean_dice, interval_over_seeds)
        rows.append(row)
    return rows


def mean_curve(runs):
    """(annotations, mean Dice over the seeds), float (K,) each."""
    return np.mean([run["annotations"] for run in runs.values()], 0), np.mean([run["dice"] for run in runs.values()], 0)


def needed(runs, share, reference):
    """The annotations with which the seeds' mean curve first reaches this share of `full`; None if it never does."""
    if reference is None:
        return None
    annotations, dice = mean_curve(runs)
    reached = annotations[dice >= share * reference]
    return int(reached[0]) if len(reached) else None


# ------------------------------------------------------------------------------------------------------------- figures


def figure_curves(found, path):
    """Dice against annotations of every arm, with the standard deviation over seeds, a panel per regime.

    Where nobody is asked, the points are where the other arms' are after as many steps."""
    regimes = [regime for regime in REGIMES if any(r == regime and arm not in FULL for r, arm in found)]
    if not regimes:
        return
    figure = Figure(figsize=(6 * len(regimes), 5.5), layout="constrained")
    for ax, regime in zip(figure.subplots(1, len(regimes), squeeze=False)[0], regimes):
        arms = [arm for arm in STYLES if (regime, arm) in found]
        asked = max((mean_curve(found[regime, arm])[0] for arm in arms if arm not in FULL), key=lambda a: a[-1])
        for place, arm in enumerate(arms):
            runs = found[regime, arm]
            annotations, dice = mean_curve(runs)
            spread = np.std([run["dice"] for run in runs.values()], 0, ddof=min(1, len(runs) - 1))
            labels = f", {annotations[0]:.0f} labels" if annotations[0] == annotations[-1] else ""
            label = f"{arm}{labels} ({len(runs)})"
            if arm == "full":
                ax.axhline(dice[-1], color="k", linestyle=":", label=label)
                continue
            at = asked if labels and len(asked) == len(dice) else annotations
            aside = 2 * (place - (len(arms) - 1) / 2)  # or the arms' bars would hide each other
            ax.errorbar(at + aside, dice, spread, fmt=STYLES[arm], markersize=5, elinewidth=0.6, label=label)
        ax.set(xlabel="annotations", ylabel="Dice on the test images", title=f"{regime} regime")
        ax.legend(title="arm (seeds)", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        ax.grid(alpha=0.3)
    save_figure(figure, path, vector=True)


def figure_differences(found, path):
    """Each arm's Dice less that of `random` against annotations, over common seeds, with the 95 % interval of
    `interval`: a panel per arm, up to four in a row, rows of their own for each regime."""
    compared = {}
    for (regime, arm), runs in found.items():
        baseline = found.get((regime, "random"), {})
        seeds = len(runs.keys() & baseline.keys())
        if arm not in ("random", *FULL) and seeds > 1:
            compared.setdefault(regime, []).append((f"{arm} ({seeds} seeds)", runs, baseline))
    if not compared:
        return
    rows = [(regime, panels[k : k + 4]) for regime, panels in compared.items() for k in range(0, len(panels), 4)]
    columns = max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(1 + 2.4 * columns, 2.6 * len(rows)), layout="constrained")
    for line, (regime, panels) in zip(figure.subplots(len(rows), columns, sharey=True, squeeze=False), rows):
        line[0].set_ylabel(f"{regime} regime:\nDice less that of random")
        for ax, (title, runs, baseline) in zip(line, panels):
            annotations, _ = mean_curve(baseline)
            at = [lambda run, k=k: run["images"][:, k] for k in range(len(annotations))]
            mean, low, high = np.transpose([against_random(runs, baseline, measure) for measure in at])
            ax.fill_between(annotations, low, high, color="0.8")
            ax.plot(annotations, mean, "k-o", markersize=3)
            ax.axhline(0, color="k", linewidth=0.7)
            ax.set(title=title, xlabel="annotations")
        for unused in line[len(panels) :]:
            unused.set_axis_off()
    save_figure(figure, path, vector=True)


def reached(annotations, dice, level):
    """The annotations at which a curve, (K,) and (K,), first comes to this Dice, between its points too; NaN if it
    never does."""
    k = int(np.argmax(dice >= level))
    if dice[k] < level:
        return np.nan
    return float(np.interp(level, dice[k - 1 : k + 1], annotations[k - 1 : k + 1])) if k else float(annotations[0])


def figure_saved(found, path):
    """How many annotations fewer than `random` each arm needs for the best Dice that random has had up to each point,
    over common seeds: a panel per regime."""
    curves = {}
    for (regime, arm), runs in found.items():
        baseline = found.get((regime, "random"), {})
        seeds = runs.keys() & baseline.keys()
        if arm in ("random", "no_queries", *FULL) or not seeds:
            continue
        annotations, dice = mean_curve({seed: runs[seed] for seed in seeds})
        reference = mean_curve({seed: baseline[seed] for seed in seeds})[1]
        # The best so far: a curve that goes down again has been there already.
        levels = np.maximum.accumulate(reference)
        saved = [reached(annotations, reference, level) - reached(annotations, dice, level) for level in levels]
        curves.setdefault(regime, []).append((annotations, saved, STYLES[arm], f"{arm} ({len(seeds)})"))
    if not curves:
        return
    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    for ax, regime in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        for annotations, saved, style, label in curves[regime]:
            ax.plot(annotations, saved, style, markersize=5, label=label)
        ax.axhline(0, color="0.6")
        ax.set(xlabel="annotations of random", ylabel="annotations saved", title=f"{regime} regime")
        ax.legend(title="arm (seeds)", fontsize=8)
    save_figure(figure, path, vector=True)


def draw_regions(ax, pool, edges, title):
    """The paper's Fig. 2 in one panel: score against Dice, the choices marked, the four regions."""
    draw_scores(ax, pool["score"], pool["dice"], {group: np.flatnonzero(pool["group"] == group) for group in GROUPS})
    for edge in edges:
        ax.axvline(edge, color="0.3", linewidth=0.7)
    ax.plot([0, edges[0]], [FAILURE] * 2, color="0.3", linewidth=0.7)
    ax.set(title=title, xlabel="uncertainty score")


def figure_scores(pools, path):
    """The paper's Fig. 2: score against Dice after the initial training, the four regions named, and the histogram."""
    pool, figure = pools[min(pools)], Figure(figsize=(7, 6), layout="constrained")
    scatter, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    low, high = edges = region_edges(pool["score"])
    draw_regions(scatter, pool, edges, f"after iteration {min(pools) - 1}: {len(pool['score'])} images in the pool")
    middle, right = (low + high) / 2, (high + pool["score"].max()) / 2
    for name, x, y in ("uncertain", middle, 0.01), ("most uncertain", right, 0.01):
        scatter.text(x, y, name, ha="center", fontsize=9)
    for name, y in ("certain and right", 0.98), ("certain and poor", 0.12):
        scatter.annotate(name, (low / 2, y), (high, y), ha="right", va="center", fontsize=9, arrowprops=ARROW)
    draw_histogram(histogram, *ceal.histogram(pool["score"])[2:])
    for edge in edges:
        histogram.axvline(edge, color="0.3", linewidth=0.7)
    scatter.set_xlabel("")
    figure.legend(*scatter.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path, vector=True)


def figure_regions(pools, path):
    """The paper's Fig. 3: score against Dice after iterations 0, 4 and 5 and before the last one."""
    edges = region_edges(pools[min(pools)]["score"])
    shown = sorted({1, 5, 6, max(pools)} & pools.keys())
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 2), min(2, len(shown)), sharex=True, sharey=True, squeeze=False).flat
    for k, ax in zip(shown, axes):
        draw_regions(ax, pools[k], edges, f"after iteration {k - 1}: {len(pools[k]['score'])} in the pool")
    for unused in axes:
        unused.set_axis_off()
    # The last panel's: it has pseudo-labels.
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path, vector=True)


def figure_pool(found, path):
    """Of the pool, iteration by iteration: the regions, the correlation of score and Dice, the groups' true quality."""
    runs = next((found[key] for key in ((regime, "ceal") for regime in REGIMES) if key in found), None)
    if runs is None or not any(run["pool"] for run in runs.values()):
        return
    tables = [run["pool"] for run in runs.values()]

    def mean(name):
        columns = np.array([[row[name] for row in table] for table in tables], float)  # None, an empty group, to NaN
        return np.ma.masked_invalid(columns).mean(0).filled(np.nan)  # without a warning where a group is empty

    iterations = [row["iteration"] for row in tables[0]]
    figure = Figure(figsize=(13, 4), layout="constrained")
    regions, correlation, quality = figure.subplots(1, 3)
    names = "certain_and_right", "uncertain_region", "most_uncertain_region", "certain_and_poor"
    grey = ["0.9", "0.65", "0.4", "0.1"]
    regions.stackplot(iterations, *map(mean, names), colors=grey, labels=[name.replace("_", " ") for name in names])
    regions.set(title="images of the pool in each region", xlabel="iteration", ylabel="images")
    for ax in figure.axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
    regions.legend(fontsize=8, loc="lower left")
    correlation.plot(iterations, mean("correlation"), "k-o", markersize=4)
    correlation.set(title="rank correlation of score and Dice", xlabel="iteration", ylabel="Spearman's rho")
    quality.plot(iterations, mean("dice_pool"), "k-", label="whole pool")
    with np.errstate(invalid="ignore"):
        for group, (label, color, marker) in GROUPS.items():
            quality.plot(
                iterations, mean(f"dice_{group}"), color=color, marker=marker, markeredgecolor="k", label=label
            )
    quality.set(title="true Dice of what each group holds", xlabel="iteration", ylabel="Dice", ylim=(0, 1))
    quality.legend(fontsize=8, loc="lower right")
    save_figure(figure, path, vector=True)


# ---------------------------------------------------------------------------------------------------------- the report


def as_text(value):
    """A cell of table.md."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, low, high = value
        return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def report(out):
    """table.csv, table.md, results.json and the figures, from all records."""
    found = read_records(out)
    if not found:
        raise UserError(f"{out}: no finished run in its records/; leave out --report to do the runs")
    rows = summarise(found)
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[as_text(row.get(name)) for name in header] for row in rows]
    write_csv(out / "table.csv", header, cells)
    lines = [header, ["---"] * len(header), *cells]
    with whole_file(out / "table.md") as partial:
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines).replace("_", " "))
    keys = "annotations", "dice", "jaccard", "pool"
    runs = {}
    for (regime, arm), seeds in found.items():
        runs.setdefault(regime, {})[arm] = {seed: {key: run[key] for key in keys} for seed, run in seeds.items()}
    with whole_file(out / "results.json") as partial:
        partial.write_text(json.dumps({"table": rows, "runs": runs}, indent=1) + "\n")
    figures = out / "figures"
    figure_curves(found, figures / "dice.png")
    figure_differences(found, figures / "difference.png")
    figure_saved(found, figures / "saved.png")
    figure_pool(found, figures / "pool.png")
    for regime in REGIMES:
        first = found.get((regime, "ceal"), {}).get(1)
        if first and (pools := first["pools"]):
            figure_scores(pools, figures / f"scores_{regime}.png")
            figure_regions(pools, figures / f"regions_{regime}.png")
    print((out / "table.md").read_text())
    print(f"{out}/table.md, table.csv, results.json and figures/ hold the report")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="records, tables and figures")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to so many (default 5)")
    parser.add_argument("--regimes", default=",".join(REGIMES), help="which (default all: %(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help="which (default all: %(default)s)")
    parser.add_argument("--only", metavar="ARM,SEED", help="this run alone, in each of --regimes; no report")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each on its share of the cores (default 1)"
    )
    parser.add_argument("--report", action="store_true", help="do no runs, report what is finished")
    args, rest = parser.parse_known_args()
    for option in rest:
        if option.partition("=")[0] in ("--run", "--seed", "--force"):
            raise UserError(f"{option}: each run has its own; leave it out (--out and --seeds are for all)")
    base, regimes = read_config(rest), args.regimes.split(",")
    arms, seeds = args.arms.split(","), range(1, args.seeds + 1)
    if args.only:
        arm, _, seed = args.only.partition(",")
        arms, seeds = [arm], [int(seed)] if seed.isdecimal() else []
    for option, given, known in ("--arms", arms, ARMS), ("--regimes", regimes, REGIMES):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{option} {unknown[0]}: not one of {', '.join(known)}")
    if not seeds or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1; --only takes ARM,SEED, for instance ceal,3")
    if args.report and args.only:
        raise UserError("--report is of all runs, --only one run without a report: leave one of them out")
    if not base.iterations:
        raise UserError("--iterations 0: arms do not differ before the first iteration; give more")
    if base.test < 2 or base.validation or base.oracle != "simulated":
        raise UserError(
            "--test 0 or 1, --validation and --oracle folder: arms are compared on test images, and nobody is asked; "
            "leave them out"
        )
    check_records(args.out, base)
    if not args.report:
        runs = [Run(regime, arm, seed) for regime in regimes for arm in arms for seed in seeds]
        run_all(list({run.name: run for run in runs}.values()), args.out, base, args.jobs)
    if not args.only:
        report(args.out)


if __name__ == "__main__":
    run_command(main)
