"""Cost-Effective Active Learning for melanoma segmentation: the whole loop (arXiv 1711.09168, section 3).

    python train.py --preset demo                                      # synthetic lesions, under 2 minutes
    python train.py --preset quick --data datasets/isic2017_96x128.h5  # real images, small: 40 minutes on a core
    python train.py                                                    # the paper's experiment: a GPU workstation

A run writes runs/NAME/ and nothing else: config.json, environment.json, history.csv, and a folder per iteration. The
same command with --run runs/NAME continues a run that was interrupted.
"""

import itertools
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import ceal
from cluster import connected
from config import DEMO_SIZE, read_command_line
from data import Dataset, draw_row, hold_out, split, write_dataset
from figures import Drawing, figure_examples, figure_overview, figure_scores
from oracle import Unanswered, find_oracle
from process import outlasting_output, stopped_at_once
from run_folder import (
    HISTORY,
    INITIAL,
    METRICS,
    begin,
    forget_selections,
    locked,
    only_ours,
    read_last_selection,
    read_queries,
    read_selection,
    write_history,
    write_queries,
    write_scores,
)
from strategies import STRATEGIES
from utils import UserError, derived_seed, read_csv, run_command, segmentation_metrics, whole_folder, write_csv

UNASKED = np.array([], int)  # for oracle.answers: only answers that came late

# ------------------------------------------------------------------------------------------------------------- the loop


def run_loop(trainer, parts, run, oracle):
    """The initial training, then score -> query -> pseudo-label -> train -> evaluate, each iteration in its folder.

    Finished iterations are read from their folders. Returns the rows of history.csv, a list of dict.
    Raises Unanswered if annotations are missing."""
    config, dataset = trainer.config, trainer.dataset
    has_mask = dataset.has_mask[parts.initial]
    labelled, to_ask = parts.initial[has_mask], parts.initial[~has_mask]
    pool = ceal.Pool(labelled, dataset.masks(labelled), np.concatenate([parts.pool, to_ask]), parts.test)
    history = resume(trainer, pool, oracle, run)
    for iteration in range(len(history), config.iterations + 1):
        if iteration and config.asked and not len(pool.unlabelled):
            print_empty_pool(oracle, iteration)
            break
        selection = run / f".queries_{iteration:02d}"
        if not selection.exists():
            select(trainer, pool, oracle, to_ask, iteration, selection)  # score -> query
        pseudo = ask(trainer, pool, oracle, iteration, selection)  # the oracle's masks
        with whole_folder(run / f"iteration_{iteration:02d}") as folder:
            # pseudo-label -> train -> evaluate
            history.append(run_iteration(trainer, pool, pseudo, iteration, selection, folder))
        for leftover in trainer.leftovers:
            leftover.unlink(missing_ok=True)
        forget_selections(config, run, len(history))
        write_history(history, run)
        print_iteration(history[-1])
    for leftover in trainer.leftovers:  # of a start that was killed before it removed them
        leftover.unlink(missing_ok=True)
    if not (run / "overview.png").exists():
        draw_overview(trainer, pool, history, run)
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
    scored = (STRATEGIES[config.query].scored or count > 0) and len(candidates) > 0
    scores, dice = trainer.score(pool, iteration, trainer.record) if scored else (np.zeros(len(candidates)), None)
    (folder / ".seconds").write_text(f"{time.monotonic() - started if scored else 0:.1f}")

    answered = oracle.answers(iteration, UNASKED)
    free = np.flatnonzero(~np.isin(candidates, [*answered.positions, *answered.rejected]))
    rng = np.random.default_rng(derived_seed(config.seed, iteration, "queries"))
    groups = STRATEGIES[config.query].select(scores[free], rng, config)
    queried = np.concatenate(list(groups.values()))
    groups["pseudo"] = ceal.select_pseudo_labels(scores[free], rng, count, exclude=queried)
    groups = {group: free[selected] for group, selected in groups.items()}
    ids = trainer.dataset.ids[candidates]
    write_queries(ids, groups, folder)
    if scored:
        write_scores(ids, scores, dice, folder)


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
    with ThreadPoolExecutor(1) as beside:
        saving = beside.submit(trainer.save, folder / "model.weights.h5")
        metrics = trainer.evaluate(pool.test)
        saving.result()
    drawing.finish()
    if metrics:
        columns = zip(*(metrics[m].round(6) for m in METRICS))
        rows = ((id, *values) for id, values in zip(trainer.dataset.ids[pool.test], columns))
        write_csv(folder / "test.csv", ["id", *METRICS], rows)
    else:  # a collapse would show nowhere else
        trainer.warn_if_collapsed(pool.training_set()[0][:64])
    means = [f"{metrics[m].mean():.6f}" if metrics else "" for m in METRICS]
    counts = iteration, pool.annotations, len(pseudo)
    row = dict(zip(HISTORY, [*counts, *means, seconds_scoring, f"{seconds_training:.1f}"]))
    write_csv(folder / "history.csv", HISTORY, [row.values()])
    return row


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


def draw_selection(trainer, iteration, folder):
    """Begin to draw scores.png and examples.png of the selection in an iteration's folder, with the network that scored
    the pool. Returns a figures.Drawing."""
    if not (folder / "scores.csv").exists() or (folder / "scores.png").exists():  # drawn by an earlier version
        return Drawing([])
    ids, scores, dice, groups = read_selection(folder)
    position = {id: n for n, id in enumerate(trainer.dataset.ids)}
    candidates = np.array([position[id] for id in ids])
    jobs = [(figure_scores, (scores, dice, groups, *ceal.histogram(scores)[2:]), folder / "scores.png")]
    if examples := find_examples(trainer, candidates, scores, dice, groups, iteration):
        jobs.append((figure_examples, (examples,), folder / "examples.png"))
    return Drawing(jobs, beside=trainer.one_gpu)


def find_examples(trainer, candidates, scores, dice, groups, iteration, each=2, shown=3):
    """The paper's Fig. 1 for `each` images of every group: image, truth, the first `shown` passes, the mean of all
    passes and the uncertainty map. Returns a list for figures.figure_examples."""
    examples = []
    for group, selected in groups.items():
        if not len(at := selected[:each]):
            continue
        mean, variance = trainer.uncertainty(candidates[at], iteration)
        # Sums of the first 0, 1, 2, ... passes: the difference of two is one pass.
        sums = [0.0, *(n * trainer.uncertainty(candidates[at], iteration, passes=n)[0] for n in range(1, shown + 1))]
        images, masks = (read(candidates[at]) for read in (trainer.dataset.images, trainer.dataset.masks))
        rated = ["no truth" if np.isnan(dice[n]) else f"Dice {dice[n]:.2f}" for n in at]
        ids = trainer.dataset.ids[candidates[at]]
        titles = [f"{id}\nscore {scores[n]:.3g}, {words}" for id, n, words in zip(ids, at, rated)]
        truths = [None if np.isnan(dice[n]) else mask for n, mask in zip(at, masks)]
        passes = zip(*(after - before for before, after in itertools.pairwise(sums)))
        examples.append((group, list(zip(titles, images, truths, passes, mean, variance))))
    return examples


def draw_overview(trainer, pool, history, run):
    """overview.png: the curve, the last selection, and masks of test images from the worst to the best (of pool images
    if there are none for test)."""
    dataset, tested, shown = trainer.dataset, bool(history[-1]["dice"]), 8
    if tested:
        rows = read_csv(run / f"iteration_{len(history) - 1:02d}" / "test.csv")
        order = pool.test[np.argsort([float(row["dice"]) for row in rows], kind="stable")]
    else:
        order = pool.unlabelled if len(pool.unlabelled) else pool.training_set()[0]
    positions = order[np.unique(np.linspace(0, len(order) - 1, shown).astype(int))]
    predictions = trainer.predict(positions) > 0.5
    truths = [mask if there else None for mask, there in zip(dataset.masks(positions), dataset.has_mask[positions])]
    dice = segmentation_metrics(dataset.masks(positions), predictions)["dice"]
    names = [id if mask is None else f"{id}, Dice {d:.2f}" for id, mask, d in zip(dataset.ids[positions], truths, dice)]
    examples = list(zip(names, dataset.images(positions), predictions, truths))
    result = f", Dice {float(history[-1]['dice']):.3f} on {len(pool.test)} test images" if tested else ""
    title = f"{run}: {len(history) - 1} iterations, {history[-1]['annotations']} annotations{result}"
    last = read_last_selection(run, len(history))
    figure_overview(title, history if tested else None, last, examples, run / "overview.png")


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
    scored = f"score the pool in {config.passes} passes, " if STRATEGIES[config.query].scored else ""
    how = f" (--query {config.query})" if config.query != "paper" else ""
    pseudo = "no pseudo-labels"
    if config.pseudo_first or config.pseudo_step:
        choice = "" if scored else f", selected by scores of {config.passes} passes"
        pseudo = f"pseudo-labels from iteration {config.pseudo_start}{choice}"
    return f"{scored}ask for {config.asked} masks{how}, train {lengths} at {config.highest_rate(1):g}; {pseudo}"


def print_empty_pool(oracle, iteration):
    """Print that the run ends before this iteration."""
    late = oracle.answers(iteration, UNASKED)
    count = len(late.positions) + len(late.rejected)
    unused = f"; {count} answers that came later are not used" if count else ""
    print(f"the pool is empty: the run ends before iteration {iteration}{unused}")


def print_iteration(row):
    """Print the result of an iteration in one line."""
    rated = f"Dice {float(row['dice']):.3f}, Jaccard {float(row['jaccard']):.3f}" if row["dice"] else "not measured"
    print(
        f"iteration {row['iteration']}: {row['annotations']} annotations, {row['pseudo_labels']:>3} pseudo-labels, "
        f"{rated}  ({float(row['seconds_scoring']):.0f} s scoring, {float(row['seconds_training']):.0f} s training)",
        flush=True,
    )


def print_end(history, run):
    """Print where the results of a finished run are, and what to do next."""
    last = run / f"iteration_{history[-1]['iteration']:0>2}"
    results = f"{run}/history.csv and {run}/dice.png hold" if history[-1]["dice"] else f"{run}/history.csv holds"
    choices = f", {last}/ the selections and their figures" if len(history) > 1 else ""
    print(f"done: {results} the result{choices}")
    weights = shlex.quote(f"{last}/model.weights.h5")
    print(f"masks for your own images: python predict.py IMAGES --weights {weights} --out masks")
    print(f"the run at a glance: {run}/overview.png")


@outlasting_output()
def main():
    """The command line."""
    config, switches, where = read_command_line(description=__doc__)
    run = Path(config.run)
    if run.exists() and not (run / "config.json").exists() and not (run.is_dir() and only_ours(run)):
        raise UserError(f"{run} exists already and is not a run: give another --run, or move it away")
    go_on = f"go on with: python train.py --run {shlex.quote(str(run))}"

    def advise():
        return go_on if (run / "config.json").exists() else "nothing has been started yet; give the same command again"

    with locked(run), connected(*where) as cluster, stopped_at_once(advise):
        # Here, because TensorFlow takes seconds to import.
        from devices import about_tensorflow, tensorflow_errors
        from trainer import Trainer, prepare

        prepare(config)
        for leftover in run.glob(".partial-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with open_dataset(config) as dataset:
            parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
            parts = hold_out(parts, dataset, config.validation, config.split_seed)
            oracle = find_oracle(config, dataset, parts, run, switches)
            print_plan(config, dataset, parts)
            about = begin(config, dataset, run, about_tensorflow(), np.concatenate([parts.initial, parts.pool]))
            try:
                with tensorflow_errors():
                    trainer = Trainer(config, dataset, *about["normalisation"], about.get("gpu_memory"))
                    trainer.cluster = cluster
                    history = run_loop(trainer, parts, run, oracle)
            except Unanswered as waiting:
                print(f"when all answers are there and correct (or now, with --partial), {go_on}")
                return 2 if waiting.invalid else 0
    print_end(history, run)
    return 2 if oracle.refused else 0


if __name__ == "__main__":
    run_command(main)
