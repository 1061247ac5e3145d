"""How a process ends: at once on a signal, not because nothing reads its output, and without temporary files.

Nothing here knows what the process does.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

from utils import STOPS, discard_if_broken, on_terminal


class Outlasting:
    """A stream whose output is dropped if nothing reads it any more: a closed pipe, or a terminal that is gone."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _try(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            discard_if_broken(self._stream)

    def write(self, text):
        """Like `write` of the stream."""
        return self._try(self._stream.write, text)

    def flush(self):
        """Like `flush` of the stream."""
        return self._try(self._stream.flush)

    def close(self):
        """Do nothing: the stream belongs to the process. TensorFlow's log closes the one that it was given."""


@contextlib.contextmanager
def outlasting_output():
    """Go on if nothing reads the output any more, as after `| head`. Its rest is dropped."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Outlasting(stream) for stream in kept)
    try:
        yield
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    finally:
        sys.stdout, sys.stderr = kept


@contextlib.contextmanager
def own_temporary_folder():
    """Yield a new folder for the temporary files of this process, which is removed at the end. TensorFlow and the
    compilers that it starts leave files if they are stopped."""
    before, folder = os.environ.get("TMPDIR"), tempfile.mkdtemp(prefix="ceal-")
    os.environ["TMPDIR"], kept, tempfile.tempdir = folder, tempfile.tempdir, folder
    try:
        yield folder
    finally:
        tempfile.tempdir = kept
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def in_notebook():
    """Whether IPython runs this program."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


@contextlib.contextmanager
def stopped_at_once(advise):
    """On Ctrl-C or one of STOPS, print what `advise()` returns and end this process at once, even in the middle of a
    long computation, with exit code 128 + the signal's number. Only for a program that loses nothing when it is killed.
    After `nohup`, SIGHUP stays ignored. A notebook's process is not ended: there Ctrl-C raises KeyboardInterrupt."""
    if in_notebook() or threading.current_thread() is not threading.main_thread():
        try:
            yield
        except KeyboardInterrupt:
            print(advise(), file=sys.stderr)
            raise
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    with own_temporary_folder() as folder:

        def watch():
            if number := os.read(readable, 1):
                restore_cursor = "\x1b[?25h" if on_terminal() else ""
                with contextlib.suppress(OSError):
                    print(f"{restore_cursor}\nstopped; {advise()}", file=sys.stderr, flush=True)
                leave_nothing(folder)
                os._exit(128 + number[0])

        numbers = [n for n in (signal.SIGINT, *STOPS) if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        # Python runs handlers only in the main thread, which may be busy for minutes, but writes to this pipe at once.
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writable)


def leave_nothing(folder):
    """Remove this temporary folder, and the one that matplotlib makes if it may not write to the home directory."""
    shutil.rmtree(folder, ignore_errors=True)
    cache = Path(os.environ.get("MPLCONFIGDIR", ""))
    if cache.name.startswith("matplotlib-") and cache.parent == Path(folder).parent:
        shutil.rmtree(cache, ignore_errors=True)
