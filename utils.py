"""What several scripts share: a user's mistakes, whole files, seeds, metrics and the drawing of figures."""

import contextlib
import csv
import errno
import fcntl
import os
import shutil
import signal
import socket
import sys
import threading
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LARGEST_SIDE = 4096  # of the network's images: one map of its first level would be 2 GB

# What the disk or its owner refuses; any other OSError is a bug of ours, and shows as one.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, *FULL}
REFUSALS |= {errno.ENAMETOOLONG, errno.ENOLCK, errno.EIO, errno.ESTALE}


class UserError(Exception):
    """A mistake that the user can mend: its text is the one sentence to print."""


def run_command(main):
    """Run `main()` as a script: a user's mistake becomes one sentence on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        remedy = "make room, and give the same command again" if error.errno in FULL else "mend that, or use another"
        message = f"{error.filename or 'a file'} cannot be read or written: {os.strerror(error.errno)}; {remedy}"
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    print_error(message)
    sys.exit(2)


def print_error(message):
    """Print one line on stderr: a line break or the like, as a file's name may hold, is escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    print(f"error: {line}", file=sys.stderr)


def in_one_line(error):
    """What a library's exception says, its beginning, without line breaks."""
    return " ".join(str(error).split())[:200]


def progress_bar():
    """A rich Progress for what takes longer than a few seconds: on a terminal only, and gone when it is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def track(items, description, total=None):
    """Yield `items` under a progress bar."""
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)


def map_in_order(function, items, workers=None):
    """Yield `function(item)` in the items' order, computed by threads, with a bounded number under way."""
    workers = workers or os.cpu_count()
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def naming(path):
    """Let an OSError that names no file, as a full disk's does, name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(path, size):
    """Make `path` a file of `size` bytes, or raise OSError: h5py does not survive a disk that fills up under it."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)


@contextlib.contextmanager
def whole_file(path):
    """Yield a path beside `path` to write to; it takes the name `path` only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A prefix, because Keras, Pillow and matplotlib look at the suffix.
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as error:
        if error.filename in (None, partial, str(partial)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # of a disk that is not to be written to
            partial.unlink()


@contextlib.contextmanager
def whole_folder(path):
    """Yield a folder beside `path` to fill; it takes the name `path` only if the block ends well."""
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for inside in partial.rglob("*"):
            _flush(inside)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def composed(name):
    """The name with each accented letter as one character, where Macs write two."""
    return unicodedata.normalize("NFC", name)


def read_csv(path):
    """The rows of a csv file, a list of dict. Raises ValueError if it is none."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(error)


def write_csv(path, header, rows):
    """Write a csv file, whole or not at all."""
    # A file's name need not be text: its bytes come out as they went in.
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
    with whole_file(path) as partial, open(partial, "w", newline="", **encoding) as file:
        csv.writer(file).writerows([header, *rows])


def resize_map(values, size):
    """A float32 map (H, W) at the size (height, width), linearly interpolated."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))


def derived_seed(*parts):
    """A 31-bit seed from, say, (run seed, iteration, purpose): the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


def segmentation_metrics(truth, prediction):
    """The ISIC challenge's metrics of each image.

    truth, prediction: bool or 0/1, (N, H, W). Returns a dict of name to float64 (N,). As in the challenge's own
    scorer, a ratio whose denominator is 0 counts as 1, and threshold_jaccard is the Jaccard index, or 0 below 0.65.
    """
    truth, prediction = (np.asarray(a, bool).reshape(len(a), -1) for a in (truth, prediction))
    true_positive = (truth & prediction).sum(1)
    false_positive = (~truth & prediction).sum(1)
    false_negative = (truth & ~prediction).sum(1)
    true_negative = truth.shape[1] - true_positive - false_positive - false_negative

    def ratio(part, whole):
        return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))

    jaccard = ratio(true_positive, true_positive + false_positive + false_negative)
    return {
        "dice": ratio(2 * true_positive, 2 * true_positive + false_positive + false_negative),
        "jaccard": jaccard,
        "sensitivity": ratio(true_positive, true_positive + false_negative),
        "specificity": ratio(true_negative, true_negative + false_positive),
        "accuracy": (true_positive + true_negative) / truth.shape[1],
        "threshold_jaccard": np.where(jaccard >= 0.65, jaccard, 0.0),
    }


# ----------------------------------------------------------------------------------------------------------- figures

# Colours that differ in grey and to the colour-blind, with a marker each.
GROUPS = {
    "no_detection": ("no detection", "#0072b2", "v"),
    "most_uncertain": ("most uncertain", "#d55e00", "^"),
    "random": ("random", "#f0c800", "s"),
    "pseudo": ("pseudo-label", "#009e73", "o"),
}


def save_figure(figure, path, vector=False):
    """Write a PNG and, if `vector`, a PDF beside it, for print."""
    for suffix in (".png", ".pdf") if vector else (".png",):
        with whole_file(Path(path).with_suffix(suffix)) as partial:
            metadata = {"CreationDate": None} if suffix == ".pdf" else None  # the same figure, the same file
            figure.savefig(partial, dpi=150, bbox_inches="tight", metadata=metadata)


def figure_scores(scores, dice, groups, counts, edges, path):
    """The paper's Fig. 2: each pool image's score against its Dice, the choices in colour; the scores' histogram.

    scores, dice: (N,), a Dice NaN where there is no truth: these are drawn below the others; groups: dict of a name in
    GROUPS to positions in them; counts, edges: of ceal.histogram.
    """
    known = np.isfinite(dice)
    figure = Figure(figsize=(7, 6), layout="constrained")
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
    """Score against Dice, (N,), the choices in colour: groups is a dict of a name in GROUPS to positions."""
    ax.scatter(scores, dice, s=6, color="0.75")
    for group, chosen in groups.items():
        label, color, marker = GROUPS[group]
        if len(chosen):
            style = {"s": 25, "color": color, "marker": marker, "edgecolors": "black", "linewidths": 0.5}
            ax.scatter(scores[chosen], dice[chosen], label=label, **style)
    ax.set(ylabel="Dice of the prediction", ylim=(-0.03, 1.03))


def draw_histogram(ax, counts, edges):
    """The scores' histogram, as the choice sees it."""
    ax.stairs(counts, edges, fill=True, color="0.4")
    ax.set(xlabel="uncertainty score", ylabel="images", yscale="symlog")


def figure_examples(examples, path):
    """The paper's Fig. 1 for some images of each group, a row an image.

    examples: a list of (group, list of (title, image uint8 (H, W, C), truth (H, W) or None, step predictions, each
    (H, W), their mean (H, W), uncertainty map (H, W))). The maps share one scale, so that they compare.
    """
    rows = [(group, example) for group, images in examples for example in images]
    highest = max(example[-1].max() for _, example in rows) or 0.25
    steps = len(rows[0][1][3])
    figure = Figure(figsize=(1.75 * (4 + steps), 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4 + steps, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for row, (group, (title, image, truth, passes, mean, variance)) in zip(axes, rows):
        row[0].set_ylabel(GROUPS[group][0], fontsize=9)
        row[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        row[0].set_title(title, fontsize=7)
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
    figure = Figure(figsize=(6, 4))
    ax = figure.subplots()
    annotations = [int(row["annotations"]) for row in history]
    ax.plot(annotations, [float(row["dice"]) for row in history], "o-", color="black", markersize=4)
    for row, x in zip(history, annotations):
        if int(row["pseudo_labels"]):
            ax.plot(x, float(row["dice"]), "o", color=GROUPS["pseudo"][1], markeredgecolor="black")
    ax.set(xlabel="annotations", ylabel="Dice on the test images, per image at 0.5")
    ax.set_title("green: trained with pseudo-labels too", fontsize=9)
    ax.grid(alpha=0.3)
    save_figure(figure, path)
