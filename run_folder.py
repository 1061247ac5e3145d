"""What a run writes to its folder and reads back: settings, iteration folders, csv files, lock and provenance.

Nothing here knows how a network is trained.
"""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data import normalisation
from figures import GROUPS, figure_history
from utils import (
    NOT_SUPPORTED,
    UserError,
    cores,
    naming,
    print_warning,
    read_csv,
    whole_file,
    write_csv,
)

METRICS = ["dice", "jaccard", "sensitivity", "specificity", "accuracy", "threshold_jaccard"]
HISTORY = ["iteration", "annotations", "pseudo_labels", *METRICS, "seconds_scoring", "seconds_training"]
INITIAL = "initial"  # the group of the images annotated before the first training
CHECKPOINT = ".training.weights.h5"  # of an unfinished training
RECORDED = "scores", "dice", "sizes", "agreement"  # of each image, by Trainer.score
PACKAGES = ["keras", "numpy", "scipy", "scikit-image", "pillow", "h5py", "matplotlib"]


# ---------------------------------------------------------------------------------------------- settings and provenance


def begin(config, dataset, run, tensorflow, positions):
    """Write config.json and environment.json. If an earlier start wrote them, check that the data are the same, and
    store another batch size. Returns what environment.json holds, with the `normalisation` of these positions.

    tensorflow: a dict that is added to environment.json. The data file is read only if its stamp is not the one in
    environment.json. Raises UserError for other data or a damaged file."""
    path = run / "environment.json"
    if (run / "config.json").exists():
        try:
            stored = json.loads(path.read_text())
            fingerprint, stamp = stored["data_fingerprint"], stored.get("data_stamp")
            same = stamp == dataset.stamp() or fingerprint == dataset.fingerprint()
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not as train.py wrote it ({error}); restore it, or give another --run")
        if not same:
            raise UserError(
                f"{dataset.path} does not hold the images and masks that {run} was started with; restore them, or give "
                "another --run"
            )
        change_settings(config, run)
        if "normalisation" not in stored:  # of an earlier version
            stored["normalisation"] = normalisation(dataset, positions)
        return stored
    data = {"data_fingerprint": dataset.fingerprint(), "data_stamp": dataset.stamp()}
    about = {**environment(tensorflow), **data, "normalisation": normalisation(dataset, positions)}
    write_json(path, about)
    write_json(run / "config.json", dataclasses.asdict(config))
    return about


def write_json(path, content):
    """Write a JSON file, completely or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def change_settings(config, run):
    """If config.json has another batch size or address of Label Studio, store the new one. For another batch size,
    drop the unfinished training."""
    stored = json.loads((run / "config.json").read_text())
    if stored.get("labelstudio", config.labelstudio) != config.labelstudio:
        stored["labelstudio"] = config.labelstudio
        write_json(run / "config.json", stored)
    if stored["batch_size"] != config.batch_size:
        (run / CHECKPOINT).unlink(missing_ok=True)
        write_json(run / "config.json", {**stored, "batch_size": config.batch_size})
        print(
            f"from now on --batch-size {config.batch_size}, not {stored['batch_size']}: an unfinished training starts "
            "again, and the results will differ from those of a run with one batch size",
            flush=True,
        )


def environment(tensorflow):
    """The versions, git commit, processor, devices and command line of this process, a dict."""
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
    """The commit of these scripts, with `-dirty` if one of them has changed since; None without git."""

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
    """Whether the folder holds only files of a start that was killed before it wrote config.json."""
    return all(path.name in ("synthetic.h5", "environment.json") or path.name.startswith(".") for path in run.iterdir())


# ----------------------------------------------------------------------------------------------------------- iterations


def write_queries(ids, groups, folder):
    """Write queries.csv. groups: a dict of group to positions in `ids`."""
    rows = [(ids[position], group) for group, positions in groups.items() for position in positions]
    write_csv(folder / "queries.csv", ["id", "group"], rows)


def read_queries(folder, iteration, dataset):
    """Read queries.csv: a dict of group to positions in the data set. The file may be missing before the first
    training. Raises KeyError, ValueError or OSError if it is damaged."""
    groups = {}
    if iteration == 0 and not (folder / "queries.csv").exists():
        return groups
    rows = read_csv(folder / "queries.csv")
    selected = {row["id"] for row in rows}
    positions = {id: position for position, id in enumerate(dataset.ids) if id in selected}
    for row in rows:
        if row["group"] not in (INITIAL, *GROUPS):
            raise ValueError(f"unknown group {row['group']}")
        groups.setdefault(row["group"], []).append(positions[row["id"]])
    return groups


def forget_selections(config, run, finished):
    """Delete all selections except that of the next iteration. finished: the number of finished iterations.

    Finished iterations have a copy of theirs. Later selections remain from iterations that are now repeated.
    With a person as the oracle all selections are kept, because answers may come late."""
    for selection in run.glob(".queries_*") if config.oracle == "simulated" else ():
        if selection.name != f".queries_{finished:02d}":
            shutil.rmtree(selection, ignore_errors=True)


def read_last_selection(run, iterations):
    """The `read_selection` of the last scored one of this number of iterations, without its ids, or None."""
    folders = [run / f"iteration_{k:02d}" for k in range(iterations)]
    scored = [folder for folder in folders if (folder / "scores.csv").exists()]
    return read_selection(scored[-1])[1:] if scored else None


def read_selection(folder):
    """A scored selection: the ids of the pool's images, and their (scores, dice, groups) for figures.figure_scores."""
    ids, scores, dice = read_scores(folder / "scores.csv")
    place, groups = {id: n for n, id in enumerate(ids)}, {group: [] for group in GROUPS}
    for row in read_csv(folder / "queries.csv"):
        if row["id"] in place:
            groups[row["group"]].append(place[row["id"]])
    return ids, scores, dice, {group: np.array(selected, int) for group, selected in groups.items()}


def write_scores(ids, scores, dice, agreement, folder):
    """Write scores.csv. ids: str (n,); scores, dice, agreement: float64 (n,), the Dice NaN without a true mask."""
    # Lists, because csv writes Python's floats ten times as fast as NumPy's, and the same.
    dice = (value if value == value else "" for value in dice.tolist())
    rows = zip(ids.tolist(), scores.tolist(), dice, agreement.tolist())
    write_csv(folder / "scores.csv", ["id", "uncertainty", "dice", "agreement"], rows)


def read_scores(path):
    """Read scores.csv, ten times as fast as `read_csv`: a list of ids, and scores and Dice, float64 (n,)."""
    ids, numbers = [], []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.reader(file)
        next(rows)
        for id, score, dice, *_ in rows:
            ids.append(id)
            numbers.append((float(score or "nan"), float(dice or "nan")))
    scores, dice = np.array(numbers).reshape(-1, 2).T
    return ids, scores, dice


def history_row(iteration, annotations, pseudo_labels, metrics, seconds_scoring, seconds_training):
    """A row of history.csv, a dict. metrics: as from Trainer.evaluate."""
    means = [f"{metrics[name].mean():.6f}" if metrics else "" for name in METRICS]
    values = iteration, annotations, pseudo_labels, *means, seconds_scoring, seconds_training
    return dict(zip(HISTORY, values))


def write_test(ids, metrics, folder):
    """Write test.csv: the metrics of each test image."""
    columns = zip(*(metrics[name].round(6) for name in METRICS))
    write_csv(folder / "test.csv", ["id", *METRICS], ((id, *values) for id, values in zip(ids, columns)))


def write_history(history, run):
    """Write history.csv and, if there are test images, dice.png."""
    write_csv(run / "history.csv", HISTORY, [row.values() for row in history])
    if history[-1]["dice"]:
        figure_history(history, run / "dice.png")


def read_record(record, iteration):
    """Read the record of `Trainer.score`: a list with a list per finished chunk of this iteration, the RECORDED.

    The file is cut after the last complete chunk, and emptied if it belongs to another iteration or version."""
    chunks, end = [], 0
    if record is None or not record.exists():
        return chunks
    with open(record, "r+b") as file:
        for line in file:
            try:
                found, *rated = json.loads(line)
            except (ValueError, TypeError):
                break
            if found != iteration or len(rated) != len(RECORDED) or not line.endswith(b"\n"):
                break
            chunks.append(rated)
            end += len(line)
        file.truncate(end)
    return chunks


# ------------------------------------------------------------------------------------------------- one process per run


@contextlib.contextmanager
def locked(folder):
    """Lock the folder for this process, also on a shared disk. It is created if missing, and removed if left empty.

    The lock is the operating system's and ends with its process on any host, so it never has to be removed by hand.
    Raises UserError if another process holds it. Warns if the disk has no locks."""
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EAGAIN or (error.errno == errno.EACCES and has_locks(folder)):
                file.seek(0)
                holder = file.read().decode() or "another process"
                raise UserError(f"{folder} is in use by {holder}; wait until it ends, or stop it")
            if error.errno not in {errno.EACCES, errno.ENOLCK, errno.EIO, *NOT_SUPPORTED}:
                raise
            warn_of_no_locks(folder, os.strerror(error.errno))
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            with naming(file.name):
                file.truncate(0)
                file.write(holder.encode())
            yield
        finally:
            if folder.exists() and [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # a parent may hold another run by now
                    for path in made:
                        path.rmdir()


def has_locks(folder):
    """Whether a new file in this folder can be locked. EACCES means a lock of another process on some disks, and no
    locks at all on others."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@functools.cache  # once for each folder
def warn_of_no_locks(folder, reason):
    """Warn that a second process in this folder cannot be noticed."""
    print_warning(f"{folder}: its disk has no locks ({reason}); start this run only once at a time")
