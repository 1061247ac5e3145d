"""The paper's experiment with its baselines over several seeds: tables, figures, and every number behind them.

    python reproduce.py --preset quick --out results/quick --regimes scarce --arms ceal,random,full --seeds 5
    python reproduce.py --preset quick --out results/quick --only ceal,3 --regimes scarce    # one run: for a job array
    python reproduce.py --preset quick --out results/quick --cluster auto      # on several machines: docs/scale.md
    python reproduce.py --preset quick --out results/quick --report            # the report of the finished runs only

The options of train.py apply to all runs. Give the same ones each time: a record with other settings is an error. Each
run is one of train.py, in runs/OUT/; the same command continues interrupted runs. The results of finished runs are kept
in OUT/records/, and the report uses only these records.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ceal
import experiment
import figures
from cluster import Job, connected, stamps
from config import add_cluster_options, cluster_options
from data import Dataset
from experiment import (
    ARMS,
    FULL,
    REGIMES,
    Run,
    check_records,
    common_iterations,
    configure,
    different_setting,
    keep_record,
    read_base,
    read_records,
    read_seeds,
    record_folders,
    recorded_data,
)
from process import outlasting_output
from run_folder import locked
from utils import (
    UserError,
    cores,
    print_warning,
    progress_bar,
    read_csv,
    run_command,
    whole_file,
    whole_folder,
    write_csv,
)

LOCKED = 300  # seconds that a worker waits for a run that another process does

# ------------------------------------------------------------------------------------------------------------- the runs


def begin_from_another(run, folder, base):
    """Make the run's folder with copies of the iterations that it shares with another arm's run, if they exist."""
    others = [run._replace(arm=arm) for arm in ARMS]
    shared = [(common_iterations(run, other, base), other) for other in others]
    for count, other in sorted(shared, reverse=True):
        source = folder.with_name(other.name)
        names = [f"iteration_{k:02d}" for k in range(count)]
        if folder.exists() or not count or not all((source / name).is_dir() for name in names):
            continue
        if different_setting(source / "config.json", configure(other, base)):
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


def start(run, folder, base, threads, prepare=None):
    """Start a process of train.py that does or continues this run. Its output goes to a log file beside the folder.
    threads: of TensorFlow, or None to leave this to the environment; prepare: called in the process at its start."""
    config = dataclasses.replace(configure(run, base), run=str(folder))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(config).items()]
    command = [sys.executable, os.path.relpath(Path(__file__).with_name("train.py")), *options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    limits = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), str(threads)) if threads else {}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **limits}, preexec_fn=prepare)


def run_all(runs, out, base, jobs, cluster=None):
    """Do the runs that have no record yet: `jobs` at a time, or by the workers of a cluster. Raises UserError if the
    data differ from those of the records and, at the end, if runs failed."""
    waiting = [run for run in runs if not (out / "records" / run.name).exists()]
    if waiting:
        check_data(base.data, out)
    work, failed = Path("runs") / out.name, []
    for run in waiting:  # train.py itself allows another batch size
        folder = work / run.name
        path = folder / "config.json"
        if path.exists() and (different := different_setting(path, configure(run, base))):
            raise UserError(f"{folder} was begun with {different}: give the same options again, or another --out")
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already; logs in {work}/", flush=True)
    ended = on_cluster(waiting, work, base, cluster) if cluster else in_processes(waiting, work, base, jobs)
    for run, failure in ended:
        if failure:
            failed.append(f"{work / run.name}.log")
        else:
            keep_record(run, work / run.name, out)
            print_run(run, out)
    if failed:
        raise UserError(f"{len(failed)} runs failed; read why at the end of these logs: {', '.join(failed)}")


def in_processes(waiting, work, base, jobs):
    """Do the runs on this machine, `jobs` at a time. Yields (run, whether it failed) when it has ended."""
    waiting, under_way = list(waiting), {}
    threads = os.environ.get("TF_NUM_INTRAOP_THREADS") or max(1, cores() // jobs)
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
                    yield run, under_way.pop(run).returncode != 0
                    progress.advance(task)
    finally:
        for process in under_way.values():
            process.terminate()
        for process in under_way.values():
            process.wait()


def on_cluster(waiting, work, base, cluster):
    """Do the runs on the workers of a cluster, which share a disk. Yields (run, None or why it failed)."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / ".shared"  # by its time of change the workers know the folder
    if not mark.exists():
        mark.touch()
    shared = stamps(mark, *([] if base.data == "auto" else [base.data]))
    job = Job(("reproduce", "Running"), {"work": work, "base": base}, "runs", shared=shared, long=True)
    for number, _, failure in cluster.as_done(job, [[run] for run in waiting]):
        if failure:
            print_warning(f"{waiting[number].name} failed: {failure}")
        yield waiting[number], failure


class Running:
    """Does runs as a worker of a cluster. task: the dict that `on_cluster` made."""

    def __init__(self, task):
        self.work, self.base = task["work"], task["base"]

    def begin(self, _):
        """Returns True: this machine has all that it needs."""
        return True

    def do(self, runs):
        """Do a run, in a process that ends with this worker. Raises UserError if it fails."""
        (run,) = runs
        folder = self.work / run.name
        wait_for(folder)
        begin_from_another(run, folder, self.base)
        prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux; 1 is PR_SET_PDEATHSIG
        end_with_parent = functools.partial(prctl, 1, signal.SIGTERM) if prctl else None
        if start(run, folder, self.base, None, end_with_parent).wait():
            last = Path(f"{folder}.log").read_text(errors="replace").splitlines()[-1:]
            raise UserError(f"{folder}.log ends with: {''.join(last)}")


def wait_for(folder):
    """Wait until no process does this run. That of a lost worker on another machine may go on for a while."""
    for _ in range(LOCKED):
        if not folder.exists():
            return
        with contextlib.suppress(UserError), locked(folder):
            return
        time.sleep(1)


def check_data(path, out):
    """Raise UserError if `path` is not a data file, or if its images and masks differ from those of the records."""
    if path == "auto":
        return
    with Dataset(path) as dataset:
        if {recorded_data(folder) for folder in record_folders(out)} - {dataset.fingerprint()}:
            raise UserError(f"{path} does not hold the images and masks of {out}/records: give another --out")


def print_run(run, out):
    """Print the result of a run in one line."""
    last = read_csv(out / "records" / run.name / "history.csv")[-1]
    print(f"{run.name}: {last['annotations']} annotations, Dice {float(last['dice']):.4f}", flush=True)


# ----------------------------------------------------------------------------------------------------------- the report


def report(out):
    """Write table.csv, table.md, results.json and the figures from all records. Raises UserError if there are none."""
    found = read_records(out)
    if not found:
        raise UserError(f"{out}: no finished run in records/; leave out --report to do the runs")
    rows = experiment.summarise(found)
    header = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(out / "table.csv", header, [[experiment.as_text(row.get(name)) for name in header] for row in rows])
    experiment.write_table(out / "table.md", header, rows)
    keys = "annotations", "dice", "jaccard", "pool"
    runs = {}
    for (regime, arm), seeds in found.items():
        runs.setdefault(regime, {})[arm] = {seed: {key: run[key] for key in keys} for seed, run in seeds.items()}
    with whole_file(out / "results.json") as partial:
        partial.write_text(json.dumps({"table": rows, "runs": runs}, indent=1) + "\n")
    draw(found, out / "figures")
    print((out / "table.md").read_text())
    print(f"the report is in {out}: table.md, table.csv, results.json and figures/")


def draw(found, folder):
    """Draw all figures. found: the records, as from `read_records`."""
    figures.figure_curves(experiment.curves(found), folder / "dice.png")
    figures.figure_differences(experiment.differences(found), folder / "difference.png")
    figures.figure_saved(experiment.saved(found), folder / "saved.png")
    if means := experiment.pool_means(found):
        figures.figure_pool(*means, folder / "pool.png")
    for regime in REGIMES:
        first = found.get((regime, "ceal"), {}).get(1)
        if not (first and (pools := first["pools"])):
            continue
        shown = {k: pools[k] for k in sorted({1, 5, 6, min(pools), max(pools)} & pools.keys())}
        regions = experiment.regions(shown)
        bins = ceal.histogram(regions[0].score)[2:]
        figures.figure_named_regions(regions[0], *bins, folder / f"scores_{regime}.png")
        figures.figure_regions(regions, folder / f"regions_{regime}.png")


def seeds_of(text):
    """The seeds of --seeds, a range; empty if it is not one."""
    try:
        return read_seeds(text if "-" in text else f"1-{text}")
    except ValueError:
        return range(0)


@outlasting_output()
def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for records, tables and figures")
    parser.add_argument("--seeds", default="5", help="do seeds 1 to this number, or such as 6-10 (default 5)")
    parser.add_argument("--regimes", default=",".join(REGIMES), help="regimes to run (default all: %(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run (default all: %(default)s)")
    parser.add_argument("--only", metavar="ARM,SEED", help="do only this run, in each of --regimes; no report")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, each on its share of the cores (default 1)"
    )
    parser.add_argument("--report", action="store_true", help="do no runs; report the finished ones")
    add_cluster_options(parser, "do the runs")
    args, rest = parser.parse_known_args()
    where = cluster_options(vars(args))
    base, regimes = read_base(rest), args.regimes.split(",")
    arms, seeds = args.arms.split(","), seeds_of(args.seeds)
    if args.only:
        arm, _, seed = args.only.partition(",")
        arms, seeds = [arm], [int(seed)] if seed.isdecimal() else []
    for option, given, known in ("--arms", arms, ARMS), ("--regimes", regimes, REGIMES):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{option} {unknown[0]}: not one of {', '.join(known)}")
    if not seeds or min(seeds) < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1; --only takes ARM,SEED, for instance ceal,3")
    if args.jobs > 1 and where[0]:
        raise UserError(f"--jobs {args.jobs}: with --cluster, give --worker-cores in place of it")
    if args.report and args.only:
        raise UserError("--report and --only cannot be combined, because --only makes no report; leave one of them out")
    if base.validation and not args.report and (full := [arm for arm in arms if arm in FULL]):
        raise UserError(f"--validation: {full[0]} would be measured on other images; name other --arms")
    check_records(args.out, base)
    if not args.report:
        runs = [Run(regime, arm, seed) for regime in regimes for arm in arms for seed in seeds]
        with connected(*where) as cluster:
            run_all(list({run.name: run for run in runs}.values()), args.out, base, args.jobs, cluster)
    if not args.only:
        report(args.out)


if __name__ == "__main__":
    run_command(main)
