"""The figures of a run and of an experiment, drawn from plain numbers.

Nothing here reads records or computes statistics. matplotlib is imported only to draw, because that takes a second.
"""

import io
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import whole_file

# Label, colour and marker of each group. The colours also differ in greyscale and for colour-blind readers.
GROUPS = {
    "no_detection": ("no detection", "#0072b2", "v"),
    "most_uncertain": ("most uncertain", "#d55e00", "^"),
    "random": ("random", "#f0c800", "s"),
    "pseudo": ("pseudo-label", "#009e73", "o"),
    "audit": ("audit", "#cc79a7", "D"),
}
MOST_POINTS = 50_000  # of a scatter plot


def new_figure(**options):
    """A matplotlib Figure without a window."""
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure, path, vector=False):
    """Write a PNG and, if `vector`, a PDF for print beside it. path: a path, or a BytesIO for a PNG only."""
    options = {"dpi": 150, "bbox_inches": "tight"}
    if isinstance(path, io.BytesIO):
        figure.savefig(path, format="png", **options)
        return
    for suffix in (".png", ".pdf") if vector else (".png",):
        with whole_file(Path(path).with_suffix(suffix)) as partial:
            metadata = {"CreationDate": None} if suffix == ".pdf" else None  # equal figures give equal files
            figure.savefig(partial, metadata=metadata, **options)


class Drawing:
    """Figures of an iteration. If `beside`, a process of its own draws them, so that a GPU does not wait for it.

    jobs: a list of (function of this file, its arguments without the path, path). `finish` returns when they are drawn.
    """

    def __init__(self, jobs, beside=False):
        self.jobs, self.process = jobs, None
        if not (jobs and beside):
            self.draw_here()
            return
        with tempfile.TemporaryFile() as file:
            pickle.dump([(function.__name__, arguments) for function, arguments, _ in jobs], file)
            file.seek(0)
            # A new session, so that Ctrl-C does not reach it. It ends when this process does.
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
            self.process = subprocess.Popen([sys.executable, __file__], stdin=file, **options)

    def draw_here(self):
        for function, arguments, path in self.jobs:
            function(*arguments, path)

    def finish(self):
        """Write the figures to their paths."""
        if self.process is None:
            return
        output, _ = self.process.communicate()
        if self.process.returncode:  # an error comes again here, where it can be seen
            self.draw_here()
            return
        for (*_, path), picture in zip(self.jobs, pickle.loads(output)):
            with whole_file(path) as partial:
                partial.write_bytes(picture)


def draw_for_another():
    """What the process of `Drawing` does: read jobs from stdin, and write a list of PNG files to stdout."""
    pictures = []
    for name, arguments in pickle.load(sys.stdin.buffer):
        globals()[name](*arguments, picture := io.BytesIO())
        pictures.append(picture.getvalue())
    sys.stdout.buffer.write(pickle.dumps(pictures))


# ------------------------------------------------------------------------------------------------------------- of a run


def figure_scores(scores, dice, groups, counts, edges, path):
    """The paper's Fig. 2: score against Dice of each pool image, the selected ones in colour, and the histogram.

    scores, dice: (N,). An image without a true mask has Dice NaN and is drawn below the others. groups: a dict of a key
    of GROUPS to positions in `scores`. counts, edges: as from ceal.histogram.
    """
    known = np.isfinite(dice)
    figure = new_figure(figsize=(7, 6), layout="constrained")
    scatter, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_scores(scatter, scores, np.where(known, dice, -0.1), groups)
    scatter.set(title=f"{len(scores)} images in the pool", ylim=(-0.03 if known.all() else -0.15, 1.03))
    if not known.all():
        ticks = np.linspace(0, 1, 6)
        scatter.set_yticks([-0.1, *ticks], ["no truth", *(f"{tick:.1f}" for tick in ticks)])
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    draw_histogram(histogram, counts, edges)
    figure.align_ylabels()
    save_figure(figure, path)


def draw_scores(ax, scores, dice, groups):
    """Draw score against Dice, (N,) each, the selected images in colour. groups: as in `figure_scores`."""
    if len(scores) <= MOST_POINTS:
        ax.scatter(scores, dice, s=6, color="0.75")
    else:  # as density, because a million points take minutes and hide each other
        density, *edges = np.histogram2d(scores, dice, (350, 150))
        extent = edges[0][0], edges[0][-1], edges[1][0], edges[1][-1]
        grey = {"cmap": "Greys", "norm": "log", "vmin": 0.3}
        image = ax.imshow(np.ma.masked_equal(density.T, 0), origin="lower", extent=extent, aspect="auto", **grey)
        image.sticky_edges.x.clear()  # or markers at the edges would be cut
    for group, selected in groups.items():
        label, color, marker = GROUPS[group]
        if len(selected):
            style = {"s": 25, "color": color, "marker": marker, "edgecolors": "black", "linewidths": 0.5}
            ax.scatter(scores[selected], dice[selected], label=label, **style)
    ax.set(ylabel="Dice of the prediction", ylim=(-0.03, 1.03))


def draw_histogram(ax, counts, edges):
    """Draw the histogram of the scores that the selection uses."""
    ax.stairs(counts, edges, fill=True, color="0.4")
    ax.set(xlabel="uncertainty score", ylabel="images", yscale="symlog")


def figure_examples(examples, path):
    """The paper's Fig. 1 for some images of each group, one row per image.

    examples: a list of (group, list of (title, image uint8 (H, W, C), truth (H, W) or None, step predictions, each
    (H, W), their mean (H, W), uncertainty map (H, W))). All maps have the same colour scale.
    """
    rows = [(group, example) for group, images in examples for example in images]
    highest = max(example[-1].max() for _, example in rows) or 0.25
    steps = len(rows[0][1][3])
    figure = new_figure(figsize=(1.75 * (4 + steps), 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4 + steps, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for row, (group, (title, image, truth, passes, mean, variance)) in zip(axes, rows):
        row[0].set_ylabel(GROUPS[group][0], fontsize=9)
        row[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        row[0].set_title(title, fontsize=7, parse_math=False)
        names = "truth" if truth is not None else "no truth", *(f"pass {n + 1}" for n in range(steps)), "mean"
        for ax, name, mask in zip(row[1:], names, (truth, *passes, mean)):
            if mask is not None:
                ax.imshow(mask, cmap="gray", vmin=0, vmax=1)
            ax.set_title(name, fontsize=7)
        colors = row[-1].imshow(variance, cmap="magma", vmin=0, vmax=highest)
        row[-1].set_title("uncertainty", fontsize=7)
    figure.colorbar(colors, ax=axes[:, -1], label="uncertainty", shrink=0.7)
    save_figure(figure, path)


def figure_history(history, path):
    """Dice on the test images against the annotations. history: the rows of history.csv, as dicts."""
    figure = new_figure(figsize=(6, 4))
    draw_history(figure.subplots(), history)
    save_figure(figure, path)


def draw_history(ax, history):
    """Draw the curve of `figure_history`."""
    annotations = [int(row["annotations"]) for row in history]
    ax.plot(annotations, [float(row["dice"]) for row in history], "o-", color="black", markersize=4)
    for row, x in zip(history, annotations):
        if int(row["pseudo_labels"]):
            ax.plot(x, float(row["dice"]), "o", color=GROUPS["pseudo"][1], markeredgecolor="black")
    ax.set(xlabel="annotations", ylabel="Dice on the test images, per image at 0.5")
    ax.set_title("green: trained with pseudo-labels too", fontsize=9)
    ax.grid(alpha=0.3)


def figure_overview(title, history, pool, examples, path):
    """A run in one figure: its curve, the last selection, and masks of the network.

    history: as in `figure_history`, or None without test images; pool: (scores, dice, groups) as in `figure_scores`, or
    None; examples: a list of (title, image uint8 (H, W, C), prediction bool (H, W), truth (H, W) or None).
    """
    figure = new_figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    figure.suptitle(title, parse_math=False)
    panels = [panel for panel in (history, pool) if panel is not None]
    axes = iter(np.atleast_1d(top.subplots(1, len(panels)))) if panels else iter(())
    if history is not None:
        draw_history(next(axes), history)
    if pool is not None:
        scores, dice, groups = pool
        ax = next(axes)
        draw_scores(ax, scores, np.where(np.isfinite(dice), dice, 0.0), groups)
        ax.set(xlabel="uncertainty score", title=f"the last selection, from {len(scores)} images in the pool")
        ax.legend(fontsize=8)
    for ax, (name, image, prediction, truth) in zip(bottom.subplots(2, 4).flat, examples):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        for mask, color in (truth, "cyan"), (prediction, "yellow"):
            if mask is not None and mask.any() and not mask.all():
                ax.contour(mask, [0.5], colors=color, linewidths=1.5)
        ax.set_title(name, fontsize=8, parse_math=False)
    for ax in bottom.axes:
        ax.set_axis_off()
    bottom.suptitle("masks of the network in yellow, true masks in cyan", fontsize=10)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------- of an experiment


class Curve(NamedTuple):
    """One line of a figure: Dice, (K,), against annotations, (K,)."""

    label: str
    style: str  # a matplotlib format, such as "k-o"
    annotations: np.ndarray
    dice: np.ndarray
    spread: np.ndarray | None = None  # half the length of the bars


def figure_curves(panels, path):
    """Dice against annotations. panels: a dict of title to a list of Curve; a single point becomes a level line."""
    if not panels:
        return
    figure = new_figure(figsize=(6 * len(panels), 5.5), layout="constrained")
    for ax, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for place, curve in enumerate(curves):
            if len(curve.dice) == 1:
                ax.axhline(curve.dice[0], color="k", linestyle=":", label=curve.label)
                continue
            aside = 2 * (place - (len(curves) - 1) / 2)  # so that bars do not hide each other
            style = {"fmt": curve.style, "markersize": 5, "elinewidth": 0.6, "label": curve.label}
            ax.errorbar(curve.annotations + aside, curve.dice, curve.spread, **style)
        ax.set(xlabel="annotations", ylabel="Dice on the test images", title=title)
        ax.legend(title="arm (seeds)", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        ax.grid(alpha=0.3)
    save_figure(figure, path, vector=True)


def figure_differences(panels, path):
    """Differences to `random` with their intervals: up to four panels in a row, and new rows for each regime.

    panels: a dict of regime to a list of (title, annotations, mean, low, high), the last four (K,).
    """
    rows = [(regime, some[k : k + 4]) for regime, some in panels.items() for k in range(0, len(some), 4)]
    if not rows:
        return
    columns = max(len(some) for _, some in rows)
    figure = new_figure(figsize=(1 + 2.4 * columns, 2.6 * len(rows)), layout="constrained")
    for line, (regime, some) in zip(figure.subplots(len(rows), columns, sharey=True, squeeze=False), rows):
        line[0].set_ylabel(f"{regime} regime:\nDice less that of random")
        for ax, (title, annotations, mean, low, high) in zip(line, some):
            ax.fill_between(annotations, low, high, color="0.8")
            ax.plot(annotations, mean, "k-o", markersize=3)
            ax.axhline(0, color="k", linewidth=0.7)
            ax.set(title=title, xlabel="annotations")
        for unused in line[len(some) :]:
            unused.set_axis_off()
    save_figure(figure, path, vector=True)


def figure_saved(panels, path):
    """Annotations saved against `random`. panels: a dict of title to a list of Curve, whose `dice` are annotations."""
    if not panels:
        return
    figure = new_figure(figsize=(6 * len(panels), 4), layout="constrained")
    for ax, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for curve in curves:
            ax.plot(curve.annotations, curve.dice, curve.style, markersize=5, label=curve.label)
        ax.axhline(0, color="0.6")
        ax.set(xlabel="annotations of random", ylabel="annotations saved", title=title)
        ax.legend(title="arm (seeds)", fontsize=8)
    save_figure(figure, path, vector=True)


def figure_label_sets(rows, path):
    """Networks trained anew on sets of labels: Dice, and what it is more than on the labels of a baseline.

    rows: a list of (name, each seed's Dice, each seed's difference, (difference, low, high) or None).
    """
    figure = new_figure(figsize=(10, 1.2 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (_, dice, differences, interval) in enumerate(rows):
        left.plot(dice, [place] * len(dice), "o", color="0.7", markersize=4)
        left.plot(np.mean(dice), place, "kD", markersize=5)
        if interval is not None:
            middle, low, high = interval
            right.plot(differences, [place] * len(differences), "o", color="0.7", markersize=4)
            right.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="kD", markersize=5, capsize=3)
    right.axvline(0, color="k", linewidth=0.7)
    left.set_yticks(range(len(rows)), [name for name, *_ in rows])
    left.set(xlabel="Dice", ylim=(len(rows) - 0.5, -0.5))
    right.set(xlabel="Dice less that of the baseline, with 95 % interval")
    for ax in left, right:
        ax.grid(alpha=0.3)
    figure.suptitle("Networks trained anew on a set of labels (grey: single seeds)", fontsize=10)
    save_figure(figure, path, vector=True)


class Regions(NamedTuple):
    """One pool with the limits of the paper's four regions."""

    title: str
    score: np.ndarray  # (n,)
    dice: np.ndarray  # (n,)
    group: np.ndarray  # str (n,), empty for images that were not selected
    edges: tuple  # two scores: certain | uncertain | most uncertain
    failure: float  # the Dice below which a prediction is poor


def draw_regions(ax, pool):
    """Draw the paper's Fig. 2 in one panel: score against Dice, the selected images, the limits of the regions."""
    draw_scores(ax, pool.score, pool.dice, {group: np.flatnonzero(pool.group == group) for group in GROUPS})
    for edge in pool.edges:
        ax.axvline(edge, color="0.3", linewidth=0.7)
    ax.plot([0, pool.edges[0]], [pool.failure] * 2, color="0.3", linewidth=0.7)
    ax.set(title=pool.title, xlabel="uncertainty score")


def figure_named_regions(pool, counts, edges, path):
    """The paper's Fig. 2 of a `Regions` with the names of the four regions, and the histogram below. counts, edges: as
    from ceal.histogram."""
    figure = new_figure(figsize=(7, 6), layout="constrained")
    scatter, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_regions(scatter, pool)
    low, high = pool.edges
    for name, x in ("uncertain", (low + high) / 2), ("most uncertain", (high + pool.score.max()) / 2):
        scatter.text(x, 0.01, name, ha="center", fontsize=9)
    arrow = {"arrowstyle": "->", "linewidth": 0.7}
    for name, y in ("certain and right", 0.98), ("certain and poor", 0.12):
        scatter.annotate(name, (low / 2, y), (high, y), ha="right", va="center", fontsize=9, arrowprops=arrow)
    draw_histogram(histogram, counts, edges)
    for edge in pool.edges:
        histogram.axvline(edge, color="0.3", linewidth=0.7)
    scatter.set_xlabel("")
    figure.legend(*scatter.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path, vector=True)


def figure_regions(pools, path):
    """The paper's Fig. 3: a panel for each `Regions` in the list."""
    figure = new_figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(-(-len(pools) // 2), min(2, len(pools)), sharex=True, sharey=True, squeeze=False).flat
    for pool, ax in zip(pools, axes):
        draw_regions(ax, pool)
    for unused in axes:
        unused.set_axis_off()
    # The labels of the last panel, because it has pseudo-labels.
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path, vector=True)


def figure_pool(iterations, means, path):
    """The pool in each iteration: its regions, the correlation of score and Dice, the true Dice of each group.

    means: a dict of the columns of a record's pool.csv to float (K,), NaN for an empty group.
    """
    figure = new_figure(figsize=(13, 4), layout="constrained")
    regions, correlation, quality = figure.subplots(1, 3)
    names = "certain_and_right", "uncertain_region", "most_uncertain_region", "certain_and_poor"
    grey = ["0.9", "0.65", "0.4", "0.1"]
    labels = [name.replace("_", " ") for name in names]
    regions.stackplot(iterations, *(means[name] for name in names), colors=grey, labels=labels)
    regions.set(title="images of the pool in each region", xlabel="iteration", ylabel="images")
    for ax in figure.axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
    regions.legend(fontsize=8, loc="lower left")
    correlation.plot(iterations, means["correlation"], "k-o", markersize=4)
    correlation.set(title="rank correlation of score and Dice", xlabel="iteration", ylabel="Spearman's rho")
    quality.plot(iterations, means["dice_pool"], "k-", label="whole pool")
    with np.errstate(invalid="ignore"):
        for group, (label, color, marker) in GROUPS.items():
            if (name := f"dice_{group}") in means:
                style = {"color": color, "marker": marker, "markeredgecolor": "k", "label": label}
                quality.plot(iterations, means[name], **style)
    quality.set(title="true Dice of what each group holds", xlabel="iteration", ylabel="Dice", ylim=(0, 1))
    quality.legend(fontsize=8, loc="lower right")
    save_figure(figure, path, vector=True)


if __name__ == "__main__":
    draw_for_another()
