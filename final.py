"""The final network of a run: trained anew, from fresh weights, on all its annotations, without pseudo-labels [ours].

In the loop one network goes on from stage to stage. Whoever has the masks trains a new one on all of them at the end.
"""

import dataclasses
import json
import shlex
import shutil
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from run_folder import HISTORY, history_row, write_json
from trainer import Trainer
from utils import derived_seed, whole_folder, write_csv


def train_final(config, dataset, normalisation, pool, iteration, steps, memory=None, command="the same command"):
    """Train a network on the annotations of a ceal.Pool, and write RUN/final: model.weights.h5, test.csv, history.csv
    with one row, and config.json, which says what it was trained on. The run itself does not change.

    An interrupted training goes on where it was, bit for bit on a CPU. A final network of other annotations or steps is
    kept beside the new one. config: of the run; normalisation: mean and std; iteration: the last finished one; steps:
    of the training, with the run's schedule; memory: as for Trainer; command: what continues the training."""
    run, (positions, labels) = Path(config.run), pool.training_set()
    settings = {"steps": steps, "iteration": iteration, "annotations": len(labels), "labels": digest(positions, labels)}
    final, unfinished = run / "final", run / ".final"
    if trained_on(final, settings):
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"{final}: this network is there already")
        return
    settings |= {"batch_size": config.batch_size}  # which may change, but not within a training
    if not trained_on(unfinished, settings):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_json(unfinished / "config.json", settings)
    mine = dataclasses.replace(config, seed=derived_seed(config.seed, "final"), initial_steps=steps)
    trainer = Trainer(mine, dataset, *normalisation, memory, unfinished)
    trainer.command = command
    print(f"final network: {steps} steps on the {len(labels)} annotations up to iteration {iteration}", flush=True)
    started = time.monotonic()
    trainer.fit(positions, labels, 0)
    seconds = f"{time.monotonic() - started:.1f}"
    if final.exists():
        final.rename(free_name(final))
    with whole_folder(final) as folder:
        metrics = trainer.finish(folder, pool.test)
        row = history_row(iteration, len(labels), 0, metrics, "0.0", seconds)
        write_csv(folder / "history.csv", HISTORY, [row.values()])
        write_json(folder / "config.json", settings)
    shutil.rmtree(unfinished)
    rated = f"Dice {float(row['dice']):.3f}, Jaccard {float(row['jaccard']):.3f}" if metrics else "not measured"
    print(f"{final}: {len(labels)} annotations, {rated}", flush=True)


def print_use(final):
    """Print what to do with the final network."""
    weights = shlex.quote(f"{final}/model.weights.h5")
    print(f"masks for your own images: python predict.py IMAGES --weights {weights} --out masks")


def digest(positions, labels):
    """A hash of annotations, a str."""
    found = blake2b(np.asarray(positions, np.int64).tobytes(), digest_size=16)
    for label in labels:
        found.update(np.ascontiguousarray(label, np.uint8))
    return found.hexdigest()


def trained_on(folder, settings):
    """Whether the config.json of a final network has these settings. That of an earlier version has no batch size."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        return stored.get("labels") == settings["labels"] and {**settings, **stored} == {**stored, **settings}
    except (OSError, ValueError, AttributeError):
        return False


def free_name(final):
    """A name for an earlier final network that makes way: final_1, final_2, ..."""
    number = 1
    while (path := final.with_name(f"{final.name}_{number}")).exists():
        number += 1
    return path
