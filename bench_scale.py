"""Large pools, and the workers of a cluster, on this machine: the rows of `python bench.py --scale`.

Each measurement is a process of its own, so that its peak memory and its cores are its own. Hours on many machines are
computed from the measured rate, and named so.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import ceal
import data
from cluster import connected
from figures import figure_scores
from run_folder import read_queries, read_selection, write_queries, write_scores
from utils import UserError, run_command

SETTINGS = {"paper": (192, 240, 1), "demo": (64, 80, 1)}  # presets that can be measured, and their images' size


class MadePool:
    """Stands in for a data.Dataset: only the ids of `count` images."""

    def __init__(self, count):
        self.ids = np.array([f"MADE_{n:09d}" for n in range(count)], object)


def bookkeeping(count, folder):
    """Do all that an iteration does with a pool of `count` images beside the network: the selection of queries and
    pseudo-labels, the csv files, reading them back, annotations, the figure. Scores and Dice are made."""
    dataset, rng = MadePool(count), np.random.default_rng(1)
    scores, dice = rng.gamma(2, 20, count), rng.random(count)
    pool = ceal.Pool([], [], np.arange(count), [])
    groups = ceal.select_queries(scores, rng)
    queried = np.concatenate(list(groups.values()))
    groups["pseudo"] = ceal.select_pseudo_labels(scores, rng, 100, queried)
    write_queries(dataset.ids, groups, folder)
    write_scores(dataset.ids, scores, dice, dice, folder)
    if read_queries(folder, 1, dataset) != {name: list(positions) for name, positions in groups.items()}:
        raise UserError(f"{folder}/queries.csv reads back differently")
    pool.annotate(queried, np.zeros((len(queried), 2, 2), np.uint8))
    _, *selection = read_selection(folder)
    figure_scores(*selection, *ceal.histogram(selection[0])[2:], folder / "scores.png")


@contextlib.contextmanager
def trainer_for(preset, count, file, folder):
    """Yield a Trainer on one thread for a data file, or for `count` drawn images if file is ""."""
    from config import PRESETS, Config
    from trainer import Trainer, prepare

    if not file:
        drawn, file = [data.draw_row(n, 1, *SETTINGS[preset]) for n in range(16)], folder / "images.h5"
        rows = (drawn[n % 16]._replace(id=f"MADE_{n:09d}") for n in range(count))
        data.write_dataset(file, rows, count, *SETTINGS[preset], "synthetic lesions")
    config = Config(**{**PRESETS[preset], "run": str(folder / "run")})
    prepare(config)
    with data.Dataset(file) as dataset:
        yield Trainer(config, dataset, [128.0] * dataset.channels, [50.0] * dataset.channels)


def timed_scoring(trainer, count, expected=None):
    """Score `count` images. Returns the scores and the seconds. Raises UserError if they are not the expected ones."""
    started = time.monotonic()
    scores = trainer.score(ceal.Pool([], [], np.arange(count), []), 1)[0]
    if expected is not None and (scores != expected).any():
        raise UserError("the workers' scores differ from those of one process")
    return scores, time.monotonic() - started


def against_none(preset, count, workers, file, folder):
    """Score `count` images in this process, then on so many workers of one core each, on so many cores in all. Returns
    the seconds of both."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    with trainer_for(preset, count, file, folder) as trainer, connected("local") as cluster:
        timed_scoring(trainer, 16)
        scores, alone = timed_scoring(trainer, count)
        trainer.cluster = cluster
        timed_scoring(trainer, 32 * workers)  # until all are up
        return alone, timed_scoring(trainer, count, scores)[1]


def two_workers(preset, count, rounds, file, folder):
    """Score `count` images on each of two workers of one core, and on both, in turns, because the speed of a machine's
    cores changes from minute to minute. Returns the median seconds of one, and of both."""
    from bench import in_turns

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with trainer_for(preset, count, file, folder) as trainer, connected("local") as cluster:
        scores, _ = timed_scoring(trainer, count)
        trainer.cluster = cluster
        timed_scoring(trainer, 64)  # hires both
        both, cluster.hire = cluster.hired, lambda: None

        def score(hired):
            cluster.hired = hired
            timed_scoring(trainer, count, scores)

        ways = {"one worker": both[:1], "both": both, "the other": both[1:]}
        seconds = in_turns({name: partial(score, hired) for name, hired in ways.items()}, rounds)
    return (seconds["one worker"] + seconds["the other"]) / 2, seconds["both"]


def in_process(*arguments):
    """Run a function of this file in a process of its own. Returns its seconds and its peak memory in bytes."""
    variables = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def bench_scale(row, preset, quick, file=None):
    """Measure all rows, in order. row: bench.row. preset: a key of SETTINGS. file: a data file whose images are scored
    in place of drawn ones. Returns the rows, a list of dict."""
    scored = 64 if quick else 512
    if file:
        with data.Dataset(file) as dataset:
            if len(dataset) < scored:
                raise UserError(f"--data {file} has {len(dataset)} images: give a file with at least {scored}")
    rows = []
    for count in (100_000, 1_000_000) if quick else (1_000_000, 10_000_000):
        (seconds,), memory = in_process("bookkeeping", count)
        targets = ("60 s", "3 GB") if count == 1_000_000 else ("", "")
        rows.append(row(f"bookkeeping of a pool of {count:,}", seconds, "s", targets[0]))
        rows.append(row("... memory", memory / 1e9, "GB", targets[1]))
    few = 300 if quick else 2000
    (_, memory), (_, larger) = (in_process("against_none", "demo", count, 2, "") for count in (few, 10 * few))
    rows.append(
        row(f"driver's memory, a pool of {10 * few:,} against {few:,}", larger / memory, "times", "at most 1.1")
    )
    (alone, worker), _ = in_process("against_none", preset, scored, 1, file or "")
    some, rounds = (64, 3) if quick else (160, 10)
    (one, two), _ = in_process("two_workers", preset, some, rounds, file or "")
    pool = f"images of {Path(file).name}" if file else "drawn images"
    return [
        *rows,
        row(f"{some} {pool}: scores that two workers change", 0, "images", "0"),  # or `two_workers` fails
        row(f"one worker against one process, same core, {scored} images", 100 * alone / worker, "%", "95 %"),
        row(f"two workers of one core against one, {rounds} turns", one / two, "times", "1.8"),
        row("two workers, a second", some / two, "images"),
        *(
            row(f"computed from that: {images:,} images on {machines} such machines", images / many, "hours")
            for images in (10**6, 10**7)
            for machines in (1, 8, 64)
            for many in [some / two * machines * 3600]
        ),
    ]


def main():
    """What `in_process` starts."""
    name, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        if name == "bookkeeping":
            bookkeeping(int(arguments[0]), Path(folder))
            seconds = [time.monotonic() - started]
        else:
            preset, count, number, file = arguments
            measure = {"against_none": against_none, "two_workers": two_workers}[name]
            seconds = measure(preset, int(count), int(number), file, Path(folder))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1000)
    print(json.dumps([seconds, memory]))


if __name__ == "__main__":
    run_command(main)
