"""What several scripts share: user errors, atomic writes, csv, seeds and metrics. What is used once is not here."""

import contextlib
import csv
import errno
import os
import shutil
import sys
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LARGEST_SIDE = 4096  # of the network's images: one map of its first level would be 2 GB
# What the disk or its owner refuses; any other OSError is a bug of ours, and shows as one.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, *FULL}
REFUSALS |= {errno.ENAMETOOLONG, errno.ENOLCK, errno.EIO, errno.ESTALE}


# ---------------------------------------------------------------------------------------------------- errors and output


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


# -------------------------------------------------------------------------------------------------- processes and names


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


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def composed(name):
    """The name with each accented letter as one character, where Macs write two."""
    return unicodedata.normalize("NFC", name)


def derived_seed(*parts):
    """A 31-bit seed from, say, (run seed, iteration, purpose): the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


# ------------------------------------------------------------------------------------------- files, whole or not at all


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


# -------------------------------------------------------------------------------------------------------------- metrics


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
