"""Cost-Effective Active Learning for melanoma segmentation: the whole loop (arXiv 1711.09168, section 3).

    python train.py --preset demo                                      # synthetic lesions, under 2 minutes
    python train.py --preset quick --data datasets/isic2017_96x128.h5  # real images, small: 25 to 50 minutes
    python train.py                                                    # the paper's experiment: a GPU workstation

A run writes runs/NAME/ and nothing else: config.json, environment.json, history.csv, and a folder per iteration. The
same command with --run runs/NAME continues a run that was interrupted.
"""

import shlex
import shutil
import time
from pathlib import Path

import numpy as np

import ceal
import strategies
from audit import draw_audit
from cluster import connected
from config import DEMO_SIZE, read_command_line
from data import Dataset, draw_row, split_of_run, write_dataset
from oracle import Unanswered, find_oracle
from process import outlasting_output, stopped_at_once
from quality import Quality, sentence, write_quality
from report import Page, draw_overview, draw_selection
from run_folder import (
    HISTORY,
    INITIAL,
    begin,
    forget_selections,
    history_row,
    locked,
    only_ours,
    read_queries,
    write_history,
    write_queries,
    write_scores,
)
from utils import UserError, derived_seed, read_csv, run_command, whole_folder, write_csv

UNASKED = np.array([], int)  # for oracle.answers: only answers that came late

# ------------------------------------------------------------------------------------------------------------- the loop


def run_loop(trainer, parts, run, oracle):
    """The initial training, then score -> query -> pseudo-label -> train -> evaluate, each iteration in its folder.

    Finished iterations are read from their folders. Returns the rows of history.csv, a list of dict.
    Raises Unanswered if annotations are missing."""
    config, dataset = trainer.config, trainer.dataset
    pool, to_ask = first_pool(dataset, parts)
    history = resume(trainer, pool, oracle, run)
    page = Page(run, dataset, beside=trainer.one_gpu)
    oracle.tell = page.update_now
    page.update()  # in case an earlier start was killed before it did
    quality = Quality(dataset.ids, parts.pool, config.seed, trainer.proposals, trainer.predict)
    for iteration in range(len(history), config.iterations + 1):
        if iteration and config.asked and not len(pool.unlabelled):
            print_empty_pool(oracle, iteration)
            break
        selection = run / f".queries_{iteration:02d}"
        if not selection.exists():
            select(trainer, pool, oracle, to_ask, iteration, selection)  # score -> query
        unanswered = pool.unlabelled
        pseudo = ask(trainer, pool, oracle, iteration, selection)  # the oracle's masks
        with whole_folder(run / f"iteration_{iteration:02d}") as folder:
            # pseudo-label -> train -> evaluate
            means = quality.before_training(pool, unanswered, iteration, selection, folder)
            history.append(run_iteration(trainer, pool, pseudo, iteration, selection, folder))
            quality.after_training(iteration, means, folder)
        for leftover in trainer.leftovers:
            leftover.unlink(missing_ok=True)
        forget_selections(config, run, len(history))
        write_history(history, run)
        print_iteration(history[-1], write_quality(run, len(history))[-1])
        if trainer.events:
            trainer.events.iteration(history[-1], run / f"iteration_{iteration:02d}", trainer)
        page.update()
    for leftover in trainer.leftovers:  # of a start that was killed before it removed them
        leftover.unlink(missing_ok=True)
    if not (run / "overview.png").exists():
        draw_overview(trainer, pool, history, run)
    page.update(done=True)
    page.finish()
    return history


def resume(trainer, pool, oracle, run):
    """Collect new answers, and go on from the finished iterations: their annotations go to the ceal.Pool, the last
    weights to the Trainer. Returns the rows of history.csv."""
    oracle.collect()
    history = finished_iterations(run, trainer.dataset, pool, oracle)
    if history:
        last = run / f"iteration_{len(history) - 1:02d}" / "model.weights.h5"
        trainer.load(last)
        print(f"{len(history)} iterations are done already, up to {last.parent}", flush=True)
        write_history(history, run)
        write_quality(run, len(history))
    stale = [] if history else ["history.csv", "quality.csv"]  # the iterations were moved away
    stale += [] if len(history) > trainer.config.iterations else ["overview.png"]
    for name in stale:
        (run / name).unlink(missing_ok=True)
    forget_selections(trainer.config, run, len(history))
    return history


def select(trainer, pool, oracle, to_ask, iteration, selection):
    """Select the images to annotate: `to_ask` before the first training, later as `query` does. The result is in the
    folder `selection`, which appears complete or not at all, so that nothing is selected twice."""
    with whole_folder(selection) as folder:
        if iteration:
            query(trainer, pool, oracle, iteration, folder)
        elif len(to_ask):
            write_queries(trainer.dataset.ids, {INITIAL: to_ask}, folder)


def query(trainer, pool, oracle, iteration, folder):
    """Score the pool; select the images to annotate, except those that the oracle has answered already, and the images
    to pseudo-label.

    Writes queries.csv, the seconds that scoring took and, if the selection uses scores, scores.csv.
    """
    config, candidates, started = trainer.config, pool.unlabelled, time.monotonic()
    count = ceal.pseudo_label_count(iteration, config.pseudo_start, config.pseudo_first, config.pseudo_step)
    scored = (strategies.STRATEGIES[config.query].scored or count or config.audit) and len(candidates) > 0
    found = trainer.score(pool, iteration, trainer.record) if scored else None
    scores = found.scores if scored else np.zeros(len(candidates))
    (folder / ".seconds").write_text(f"{time.monotonic() - started if scored else 0:.1f}")

    answered = oracle.answers(iteration, UNASKED)
    free = np.flatnonzero(~np.isin(candidates, [*answered.positions, *answered.rejected]))
    audited = draw_audit(free, config, iteration)
    free = np.setdiff1d(free, audited)
    rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
    seen = {"sizes": found.sizes[free], "agreement": found.agreement[free]} if scored else {}
    groups = strategies.select(scores[free], rng, config, {**seen, "iteration": iteration})
    queried = np.concatenate(list(groups.values()))
    groups["pseudo"] = ceal.select_pseudo_labels(scores[free], rng, count, exclude=queried)
    groups = {group: free[selected] for group, selected in groups.items()} | (
        {"audit": audited} if config.audit else {}
    )
    ids = trainer.dataset.ids[candidates]
    write_queries(ids, groups, folder)
    if scored:
        write_scores(ids, scores, found.dice, found.agreement, folder)


def ask(trainer, pool, oracle, iteration, selection):
    """Put the oracle's answers into the ceal.Pool. Returns the positions to pseudo-label."""
    try:
        groups = read_queries(selection, iteration, trainer.dataset)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{selection}: not as train.py wrote it ({error}); remove it to select anew")
    asked = {group: positions for group, positions in groups.items() if group != "pseudo"}
    oracle.ask(iteration, asked, (lambda positions: trainer.proposals(positions, iteration)) if iteration else None)
    pseudo = annotate(pool, oracle, iteration, groups)
    if not pool.annotations:
        raise UserError(
            f"{selection.parent}: every image of --initial was rejected, so there is nothing to train on; start "
            "another run with more of them or another --split-seed"
        )
    return pseudo


def annotate(pool, oracle, iteration, groups):
    """Put the oracle's answers of an iteration, corrections of earlier ones included, into the ceal.Pool. groups: as
    `read_queries` returns them. Returns the positions to pseudo-label, without those answered in the meantime."""
    asked = [position for group, positions in groups.items() if group != "pseudo" for position in positions]
    answers = oracle.answers(iteration, np.array(asked, int))
    in_pool = np.concatenate([pool.unlabelled, np.array(asked, int)])
    drawn, rejected = np.isin(answers.positions, in_pool), np.isin(answers.rejected, in_pool)
    pool.annotate(answers.positions[drawn], answers.masks[drawn])
    pool.reject(answers.rejected[rejected])
    pool.correct(answers.positions[~drawn], answers.masks[~drawn], answers.rejected[~rejected])
    pseudo = np.array(groups.get("pseudo", []), int)
    return pseudo[np.isin(pseudo, pool.unlabelled)]


def run_iteration(trainer, pool, pseudo, iteration, selection, folder):
    """Pseudo-label these positions, train and evaluate; all results go to `folder`. Returns the row of history.csv."""
    for path in selection.glob("[!.]*"):
        shutil.copy(path, folder)
    seconds_scoring = (selection / ".seconds").read_text() if iteration else "0.0"
    drawing = draw_selection(trainer, iteration, folder)
    pseudo_labels = list(trainer.predict(pseudo)) if len(pseudo) else []
    started = time.monotonic()
    trainer.fit(*pool.training_set(pseudo, pseudo_labels), iteration)
    seconds_training = time.monotonic() - started
    metrics = trainer.finish(folder, pool.test)
    drawing.finish()
    if not metrics:  # a collapse would show nowhere else
        trainer.warn_if_collapsed(pool.training_set()[0][:64])
    row = history_row(iteration, pool.annotations, len(pseudo), metrics, seconds_scoring, f"{seconds_training:.1f}")
    write_csv(folder / "history.csv", HISTORY, [row.values()])
    return row


def final_network(config, dataset, about, parts, oracle, steps):
    """What --final-steps does: a network trained anew on all accepted annotations of the run."""
    from final import print_use, train_final

    (pool, _), run = first_pool(dataset, parts), Path(config.run)
    oracle.collect()
    history = finished_iterations(run, dataset, pool, oracle)
    if not history:
        raise UserError(f"--final-steps: {run} has no finished iteration yet; run it first without --final-steps")
    for k in len(history), len(history) + 1:  # those that came since, the last ones while an iteration was trained
        annotate(pool, oracle, k, {})
    command = f"python train.py --run {shlex.quote(str(run))} --final-steps {steps}"
    memory = about.get("gpu_memory")
    train_final(config, dataset, about["normalisation"], pool, len(history) - 1, steps, memory, command)
    print_use(run / "final")
    return 2 if oracle.refused else 0


def first_pool(dataset, parts):
    """The ceal.Pool of a data.Split before the first query, and the images of `initial` that a person is asked for,
    because they have no mask: positions in the data set."""
    has_mask = dataset.has_mask[parts.initial]
    labelled, to_ask = parts.initial[has_mask], parts.initial[~has_mask]
    return ceal.Pool(labelled, dataset.masks(labelled), np.concatenate([parts.pool, to_ask]), parts.test), to_ask


def finished_iterations(run, dataset, pool, oracle):
    """The rows of history.csv of the finished iterations; their annotations go to the ceal.Pool.

    Raises UserError if a folder is damaged or missing."""
    history = []
    while (folder := run / f"iteration_{len(history):02d}").is_dir():
        try:
            (row,) = read_csv(folder / "history.csv")
            pseudo = annotate(pool, oracle, len(history), read_queries(folder, len(history), dataset))
            expected = len(history), pool.annotations, len(pseudo)
            if tuple(int(row[name]) for name in HISTORY[:3]) != expected:
                raise ValueError("queries are missing")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder}: not as train.py wrote it ({error}); move it and all later ones away to do them anew"
            )
        history.append(row)
    numbers = (path.name.partition("_")[2] for path in run.glob("iteration_*"))
    if any(number.isdecimal() and int(number) >= len(history) for number in numbers):
        raise UserError(f"{folder} is missing, and later ones are there: put it back, or move all later ones away too")
    return history


# -------------------------------------------------------------------------------------------------- what a person sees


def open_dataset(config):
    """The run's Dataset, drawn into the run's folder if `config.data` is auto."""
    path = Path(config.data)
    if config.data == "auto":
        path = Path(config.run, "synthetic.h5")
        size, count = DEMO_SIZE.values(), config.initial + config.pool + config.test
        rows = (draw_row(index, config.split_seed, *size) for index in range(count))
        if not path.exists():
            write_dataset(path, rows, count, *size, "synthetic lesions")
    elif not path.exists() and Path(config.run, "config.json").exists():
        raise UserError(
            f"{path} does not exist here, and {config.run} was started with it: give the same command in the folder "
            "where it was started, or put the file back"
        )
    elif not path.exists():
        small = " --height 96 --width 128"
        size = {"quick": small, "best": f"{small} --channels 3"}.get(config.preset, "")
        raise UserError(
            f"{path} does not exist: download the training data and the Part 1 ground truth of ISIC 2017 from "
            f"challenge.isic-archive.com/data/#2017, unpack them, and run `python data.py isic FOLDER {path}{size}`. "
            "To see the program run without a download: python train.py --preset demo"
        )
    return Dataset(path)


def print_plan(config, dataset, parts):
    """Print what the run will do, before it does it."""
    size = f"{dataset.height}x{dataset.width}, {dataset.channels} channel(s)"
    print(f"data      {dataset.path}: {dataset.source}, {size}")
    tested = "held out of the labelled ones" if config.validation else "for test"
    print(f"split     {len(parts.initial)} at first, {len(parts.pool)} in the pool, {len(parts.test)} {tested}")
    steps = config.training_steps(len(parts.initial), 0)
    rate = f"a learning rate of {config.learning_rate:g}, {config.schedule}"
    print(f"training  {steps} steps of up to {config.batch_size} images at {rate}")
    if config.iterations:
        print(f"CEAL      {config.iterations} iterations: {plan_of_iteration(config)}")
    print(f"run       {config.run}", flush=True)
    if not len(parts.test):
        print("there are no test images: the result is not measured, the metrics in history.csv stay empty", flush=True)


def plan_of_iteration(config):
    """What an iteration does, in words."""
    lengths = f"{config.active_steps} steps" if config.active_steps else f"{config.active_epochs} epochs"
    scored = f"score the pool in {config.passes} passes, " if strategies.STRATEGIES[config.query].scored else ""
    how = f" (--query {config.query})" if config.query != "paper" else ""
    pseudo = "no pseudo-labels"
    if config.pseudo_first or config.pseudo_step:
        choice = "" if scored else f", selected by scores of {config.passes} passes"
        pseudo = f"pseudo-labels from iteration {config.pseudo_start}{choice}"
    how += f" and {config.audit} to audit" * bool(config.audit)
    return f"{scored}ask for {config.asked} masks{how}, train {lengths} at {config.highest_rate(1):g}; {pseudo}"


def print_empty_pool(oracle, iteration):
    """Print that the run ends before this iteration."""
    late = oracle.answers(iteration, UNASKED)
    count = len(late.positions) + len(late.rejected)
    unused = f"; {count} answers that came later are not used" if count else ""
    print(f"the pool is empty: the run ends before iteration {iteration}{unused}")


def print_iteration(row, quality):
    """Print the result of an iteration, given its rows of history.csv and quality.csv."""
    rated = f"Dice {float(row['dice']):.3f}, Jaccard {float(row['jaccard']):.3f}" if row["dice"] else "not measured"
    print(
        f"iteration {row['iteration']}: {row['annotations']} annotations, {row['pseudo_labels']:>3} pseudo-labels, "
        f"{rated}  ({float(row['seconds_scoring']):.0f} s scoring, {float(row['seconds_training']):.0f} s training)",
        flush=True,
    )
    if changed := sentence(quality):
        print(changed, flush=True)


def print_end(history, run):
    """Print where the results of a finished run are, and what to do next."""
    last = run / f"iteration_{history[-1]['iteration']:0>2}"
    results = f"{run}/history.csv and {run}/dice.png hold" if history[-1]["dice"] else f"{run}/history.csv holds"
    choices = f", {last}/ the selections and their figures" if len(history) > 1 else ""
    print(f"done: {results} the result{choices}")
    weights = shlex.quote(f"{last}/model.weights.h5")
    print(f"masks for your own images: python predict.py IMAGES --weights {weights} --out masks")
    print(f"the run at a glance: {run}/overview.png, and in full: {run}/report.html")
    if (run / "tensorboard").exists():
        print(f"its curves: pip install tensorboard; tensorboard --logdir {shlex.quote(str(run))}")


@outlasting_output()
def main():
    """The command line."""
    config, switches, where = read_command_line(description=__doc__)
    run = Path(config.run)
    if run.exists() and not (run / "config.json").exists() and not (run.is_dir() and only_ours(run)):
        raise UserError(f"{run} exists already and is not a run: give another --run, or move it away")
    go_on = f"go on with: python train.py --run {shlex.quote(str(run))}"
    if where[0]:
        go_on += f" --cluster {shlex.quote(where[0])}"

    def advise():
        return go_on if (run / "config.json").exists() else "nothing has been started yet; give the same command again"

    with locked(run), connected(*where) as cluster, stopped_at_once(advise):
        # Here, because TensorFlow takes seconds to import.
        from devices import about_tensorflow, tensorflow_errors
        from events import Events
        from trainer import Trainer, prepare

        prepare(config)
        for leftover in run.glob(".partial-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with open_dataset(config) as dataset:
            parts = split_of_run(config, dataset)
            oracle = find_oracle(config, dataset, parts, run, switches)
            print_plan(config, dataset, parts)
            about = begin(config, dataset, run, about_tensorflow(), np.concatenate([parts.initial, parts.pool]))
            if steps := switches["final_steps"]:
                with tensorflow_errors():
                    return final_network(config, dataset, about, parts, oracle, steps)
            try:
                with tensorflow_errors():
                    trainer = Trainer(config, dataset, *about["normalisation"], about.get("gpu_memory"))
                    trainer.cluster = cluster
                    if switches["tensorboard"]:
                        trainer.events = Events(run, parts.test if len(parts.test) else parts.pool)
                    history = run_loop(trainer, parts, run, oracle)
            except Unanswered as waiting:
                print(f"the run so far: {run}/report.html")
                print(f"when all answers are there and correct (or now, with --partial), {go_on}")
                return 2 if waiting.invalid else 0
    print_end(history, run)
    return 2 if oracle.refused else 0


if __name__ == "__main__":
    run_command(main)
