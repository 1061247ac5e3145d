"""What several scripts share: user errors, atomic writes, csv, seeds and metrics. Code of one script is not here."""

import contextlib
import csv
import errno
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LARGEST_SIDE = 4096  # pixels of the network's input; one map of its first level then takes 2 GB
# Errors of the disk or its permissions, reported to the user. Any other OSError is a bug and gets a traceback.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, *FULL}
REFUSALS |= {errno.ENAMETOOLONG, errno.ENOLCK, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
# What a disk answers if it lacks a call; 524 is an error of Linux that should not leave the kernel, but does.
NOT_SUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, 524}
STOPS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # the last one is Slurm's warning before the time limit


# ---------------------------------------------------------------------------------------------------- errors and output


class UserError(Exception):
    """A mistake that the user can correct. Its text is the one sentence to print."""


class FileInUse(UserError):
    """Another program has the file open, or left it marked as open."""


def run_command(main):
    """Run `main()` as a script. A UserError or an error of the disk is one sentence on stderr and exit code 2. If the
    reader of the output ends, as in `| head`, the script ends too, without a message."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for names with characters that the terminal cannot show
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]
    try:
        with stops_raise():
            code = exit_code(main)
        for stream in streams:
            stream.flush()
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
        for stream in streams:
            discard_if_broken(stream)
    sys.exit(code)


def exit_code(main):
    """The exit code of `main()`. Its errors that a user can correct are printed."""
    try:
        return main()
    except SystemExit as end:  # of argparse
        return end.code
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        remedy = "free some space and repeat the command" if error.errno in FULL else "fix this, or use another path"
        message = f"{error.filename or 'a file'} cannot be read or written: {os.strerror(error.errno)}; {remedy}"
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return 128 + (stop.args or [signal.SIGINT])[0]
    print_error(message)
    return 2


@contextlib.contextmanager
def stops_raise():
    """Let each of STOPS raise KeyboardInterrupt, so that temporary files are removed. After `nohup`, SIGHUP stays
    ignored."""

    def stop(number, _):
        raise KeyboardInterrupt(number)

    # Python allows this in the main thread only.
    numbers = STOPS if threading.current_thread() is threading.main_thread() else ()
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def discard_if_broken(stream):
    """If nothing reads this stream any more, send its output to nowhere, also that of C libraries."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def print_error(message):
    """Print one line on stderr."""
    print(f"error: {printable(message)}", file=sys.stderr)


def print_warning(message):
    """Print one line on stderr, about something that does not change the exit code."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def printable(text):
    """The text in one line. Line breaks and control characters, for example in file names, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_of(names, most=5):
    """The first names of a list, separated by commas, with dots if there are more."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def in_one_line(error):
    """The first 200 characters of a library's error message, without line breaks."""
    return " ".join(str(error).split())[:200]


def on_terminal():
    """Whether stderr is a terminal. In a notebook it may lack `isatty`, and in a service it may be None."""
    return hasattr(sys.stderr, "isatty") and sys.stderr.isatty()


def progress_bar():
    """A rich Progress for tasks of more than a few seconds. It shows on a terminal only and disappears at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Rich would also take FORCE_COLOR and TTY_COMPATIBLE for a terminal.
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not on_terminal())


def track(items, description, total=None):
    """Yield `items` and show a progress bar."""
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)


# -------------------------------------------------------------------------------------------------- processes and names


def map_in_order(function, items, workers=None):
    """Yield `function(item)` in the order of the items. Threads compute a bounded number of them ahead."""
    workers = workers or cores()
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
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def composed(name):
    """The name with each accented letter as one character; macOS uses two."""
    return unicodedata.normalize("NFC", name)


def derived_seed(*parts):
    """A 31-bit seed from parts such as (run seed, iteration, purpose), the same in every process on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


# ---------------------------------------------------------------------------------------- files, complete or not at all


@contextlib.contextmanager
def naming(path):
    """Add the file name to an OSError that has none, such as "disk full"."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _flush(path):
    """Write a file or a folder to the disk now. Some disks cannot do this, or not for folders (EINVAL, EIO, EACCES);
    then the system writes it later."""
    try:
        with naming(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno in FULL or (error.errno not in NOT_SUPPORTED and not os.path.isdir(path)):
            raise


def reserve(path, size):
    """Make `path` a file of `size` bytes, or raise OSError. h5py crashes if the disk fills up while it writes."""
    with naming(path), open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # macOS lacks the function, and some disks lack the call
            if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
                raise
            for start in range(0, size, 2**20):
                file.write(bytes(min(2**20, size - start)))


def open_hdf5(path):
    """Open an HDF5 file for reading, also on a disk without locks. Raises FileInUse if another program writes to it."""
    try:
        try:
            return h5py.File(path)
        except OSError as error:
            lock = re.search(r"unable to lock file, errno = (\d+)", str(error))
            if not lock or int(lock[1]) == errno.EAGAIN:
                raise
            # The disk has no locks. We need none, because our files are only replaced as a whole.
            return h5py.File(path, locking=False)
    except OSError as error:
        if "unable to lock file" in str(error):
            raise FileInUse(f"{path} is open in another program; close it there and repeat the command")
        if "already open for" in str(error):
            raise FileInUse(
                f"{path} is marked as open for writing: close the program that has it open, or, if that was killed, "
                f"remove the mark with `h5clear -s {shlex.quote(str(path))}` (of hdf5-tools); then repeat the command"
            )
        raise


@contextlib.contextmanager
def whole_file(path):
    """Yield a path beside `path` to write to. It is renamed to `path` only if the block raises nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A prefix, because Keras, Pillow and matplotlib depend on the suffix.
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
        with contextlib.suppress(OSError):  # on a read-only disk
            partial.unlink()


@contextlib.contextmanager
def whole_folder(path):
    """Yield a folder beside `path` to fill. It is renamed to `path` only if the block raises nothing."""
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
    """The rows of a csv file, a list of dict. Raises ValueError if it is not valid csv."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(error)


def write_csv(path, header, rows):
    """Write a csv file, completely or not at all."""
    # Ids come from file names, which may hold bytes that are not UTF-8; these are written unchanged.
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
    with whole_file(path) as partial, open(partial, "w", newline="", **encoding) as file:
        csv.writer(file).writerows([header, *rows])


# -------------------------------------------------------------------------------------------------------------- metrics


def segmentation_metrics(truth, prediction):
    """The ISIC challenge's metrics for each image.

    truth, prediction: bool or 0/1, (N, H, W). Returns a dict of name to float64 (N,). As in the challenge's own
    scorer, a ratio with a denominator of 0 is 1, and threshold_jaccard is the Jaccard index, or 0 if it is below 0.65.
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


LIKELY_DISPUTED = 0.75  # specialists are likely to disagree on an image whose expected agreement is lower


def expected_agreement(probability):
    """The Dice of two masks whose pixels are lesion with the probabilities of a map, independently: sum(p^2) / sum(p).

    probability: (N, H, W). Returns float64 (N,) in [0, 1], 1 for an empty map. It compares two people as far as the
    network is as unsure as they are."""
    total, square = (np.sum(values, (1, 2), dtype=np.float64) for values in (probability, np.square(probability)))
    return np.where(total > 0, square / np.maximum(total, np.finfo(float).tiny), 1.0)
