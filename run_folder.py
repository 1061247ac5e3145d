"""What a run writes and reads back: its settings, iteration folders, csv files, lock and provenance.

Nothing here knows how a network is trained.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from figures import GROUPS, figure_history
from utils import UserError, cores, naming, read_csv, whole_file, write_csv

METRICS = ["dice", "jaccard", "sensitivity", "specificity", "accuracy", "threshold_jaccard"]
HISTORY = ["iteration", "annotations", "pseudo_labels", *METRICS, "seconds_scoring", "seconds_training"]
INITIAL = "initial"  # the group of the images that are asked for before the first training
PACKAGES = ["keras", "numpy", "scipy", "scikit-image", "pillow", "h5py", "matplotlib"]


# ---------------------------------------------------------------------------------------------- settings and provenance


def begin(config, dataset, run, tensorflow):
    """Write config.json and environment.json, or, if an earlier start did, check that the data are the same.

    tensorflow: a dict, what is to be known about it in environment.json. Raises UserError for other data."""
    fingerprint, path = dataset.fingerprint(), run / "environment.json"
    if (run / "config.json").exists():
        try:
            stored = json.loads(path.read_text())["data_fingerprint"]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not as train.py wrote it ({error}); put it back, or give another --run")
        if stored != fingerprint:
            raise UserError(
                f"{dataset.path} does not hold the images and masks that {run} was begun with; put them back, or give "
                "another --run"
            )
        return
    for name, content in (
        ("environment", {**environment(tensorflow), "data_fingerprint": fingerprint}),
        ("config", dataclasses.asdict(config)),
    ):
        with whole_file(run / f"{name}.json") as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def environment(tensorflow):
    """What this process runs on: versions, git commit, processor, devices, command line, a dict."""
    return {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        **tensorflow,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": os.environ.get("TF_NUM_INTRAOP_THREADS", "all"),
    }


def git_commit():
    """The commit of these scripts, with `-dirty` if one of them was changed since; None where there is no git."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except FileNotFoundError:
        return None
    return commit + "-dirty" * bool(changed) or None


def processor():
    """The processor's name."""
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def only_ours(run):
    """Whether the folder holds nothing but what is left of a start that was killed before it wrote config.json."""
    return all(path.name in ("synthetic.h5", "environment.json") or path.name.startswith(".") for path in run.iterdir())


# ----------------------------------------------------------------------------------------------------------- iterations


def write_queries(ids, groups, folder):
    """queries.csv. groups: a dict of group to positions in `ids`."""
    rows = [(ids[position], group) for group, positions in groups.items() for position in positions]
    write_csv(folder / "queries.csv", ["id", "group"], rows)


def read_queries(folder, iteration, dataset):
    """What `write_queries` wrote: a dict of group to positions in the data set. Before the first training there may be
    no such file. Raises KeyError, ValueError or OSError if it is damaged."""
    positions, groups = {id: position for position, id in enumerate(dataset.ids)}, {}
    if iteration == 0 and not (folder / "queries.csv").exists():
        return groups
    for row in read_csv(folder / "queries.csv"):
        if row["group"] not in (INITIAL, *GROUPS):
            raise ValueError(f"{row['group']} is no group of queries.csv")
        groups.setdefault(row["group"], []).append(positions[row["id"]])
    return groups


def forget_selections(config, run, finished):
    """Remove all selections but that of the next iteration, `finished` being the number of finished ones.

    The folders of finished iterations hold a copy of theirs; a later one is left over from iterations that are done
    anew. Selections that a person was asked about stay, because an answer may come late."""
    for selection in run.glob(".queries_*") if config.oracle == "simulated" else ():
        if selection.name != f".queries_{finished:02d}":
            shutil.rmtree(selection, ignore_errors=True)


def read_last_selection(run, iterations):
    """The last of so many iterations that was scored: (scores, dice, groups) as figures.figure_scores takes them; None
    if none was."""
    folders = [run / f"iteration_{k:02d}" for k in range(iterations)]
    scored = [folder for folder in folders if (folder / "scores.csv").exists()]
    if not scored:
        return None
    rows = read_csv(scored[-1] / "scores.csv")
    place, groups = {row["id"]: n for n, row in enumerate(rows)}, {group: [] for group in GROUPS}
    for row in read_csv(scored[-1] / "queries.csv"):
        if row["id"] in place:
            groups[row["group"]].append(place[row["id"]])
    scores, dice = (np.array([float(row[name] or "nan") for row in rows]) for name in ("uncertainty", "dice"))
    return scores, dice, {group: np.array(selected, int) for group, selected in groups.items()}


def write_history(history, run):
    """history.csv and, if there are test images, its figure."""
    write_csv(run / "history.csv", HISTORY, [row.values() for row in history])
    if history[-1]["dice"]:
        figure_history(history, run / "dice.png")


def read_record(record, iteration):
    """The (scores, Dice) of each chunk of this iteration in a file of `Trainer.score`, up to where it breaks off; the
    file is cut there, and emptied if it is of another iteration."""
    chunks, end = [], 0
    if record is None or not record.exists():
        return chunks
    with open(record, "r+b") as file:
        for line in file:
            try:
                found, *rated = json.loads(line)
            except (ValueError, TypeError):
                break
            if found != iteration or not line.endswith(b"\n"):
                break
            chunks.append(rated)
            end += len(line)
        file.truncate(end)
    return chunks


# ------------------------------------------------------------------------------------ one process a run, stopped safely


@contextlib.contextmanager
def locked(folder):
    """Hold the folder, made if need be, for this process alone, on a shared disk too; one left empty is removed.

    The system's lock, which dies with its process on whatever host, so none is ever left behind. Raises UserError if
    another process holds it."""
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode() or "another process"
            raise UserError(f"{folder} is in use by {holder}: wait for it, or stop it")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            with naming(file.name):
                file.truncate(0)
                file.write(holder.encode())
            yield
        finally:
            if folder.exists() and [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another run may be in a parent by now
                    for path in made:
                        path.rmdir()


@contextlib.contextmanager
def stopped_at_once(advise):
    """At Ctrl-C or SIGTERM print what `advise()` returns and end this process at once, exit code 130 or 143, even in
    the middle of a long computation: for a program that loses nothing by it."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def watch():
        if number := os.read(readable, 1):
            restore_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            print(f"{restore_cursor}\nstopped; {advise()}", file=sys.stderr, flush=True)
            os._exit(128 + number[0])

    # Python runs handlers in the main thread alone, which may be busy for minutes; the pipe is written to at once.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writable)
