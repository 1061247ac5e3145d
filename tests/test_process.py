"""process.py: output that nobody reads, signals, temporary files, notebooks."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import run_folder
from process import outlasting_output, stopped_at_once


class Gone:
    """A stream whose terminal is gone."""

    def __init__(self, descriptor):
        self.descriptor, self.number = descriptor, errno.EIO

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self):
        return self.descriptor


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_training_goes_on_if_its_output_is_not_read(monkeypatch, kind, name):
    readable, writable = os.pipe()
    os.close(readable)
    stream = os.fdopen(writable, "w") if kind == "pipe" else Gone(writable)
    monkeypatch.setattr(sys, name, stream)
    steps = []
    with outlasting_output():
        for step in range(3):
            print("step", step, file=getattr(sys, name), flush=True)
            steps.append(step)
    assert steps == [0, 1, 2]
    assert getattr(sys, name) is stream
    assert os.write(writable, b"x") == 1  # to nowhere, also from C libraries
    os.close(writable) if kind == "terminal" else stream.close()


def test_a_full_disk_under_the_output_stays_an_error(monkeypatch):
    stream = Gone(1)
    stream.number = errno.ENOSPC
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError, match="No space left"), outlasting_output():
        print("x")


# Stands in for a training: it writes temporary files, says that it is ready, and computes.
STAND_IN = """
import os, signal, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
import utils
from process import stopped_at_once
def main():
    with stopped_at_once(lambda: "go on with: x"):
        tempfile.NamedTemporaryFile(suffix=".py", delete=False).close()
        print("ready", flush=True)
        time.sleep(2 if "nohup" in sys.argv else 60)
utils.run_command(main)
"""


def stand_in(folder, number, *arguments):
    """Start STAND_IN with `folder` for temporary files, send the signal, and return (exit code, stderr)."""
    command = [sys.executable, "-c", STAND_IN, str(Path(run_folder.__file__).parent), *arguments]
    environment = {**os.environ, "TMPDIR": str(folder), "MPLCONFIGDIR": "/dev/null/no"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    assert list(folder.rglob("*.py"))
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    return process.returncode, error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_process_leaves_nothing_in_the_temporary_folder(tmp_path, number):
    code, error = stand_in(tmp_path, number)
    assert code == 128 + number
    assert error.splitlines()[-1] == "stopped; go on with: x"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_after_nohup_a_training_goes_on(tmp_path):
    code, error = stand_in(tmp_path, signal.SIGHUP, "nohup")
    assert code == 0
    assert "stopped" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["notebook", "thread", "script"])
def test_a_notebooks_signals_are_as_they_were(monkeypatch, place):
    if place == "notebook":
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: object()))
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    kept, before = signal.set_wakeup_fd(writable), [signal.getsignal(n) for n in numbers]
    inside, environment = [], dict(os.environ)

    def train():
        with stopped_at_once(lambda: ""):
            inside.extend(signal.getsignal(n) for n in numbers)

    if place == "thread":
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    else:
        train()
    assert signal.set_wakeup_fd(kept) == writable
    assert [signal.getsignal(n) for n in numbers] == before
    assert (inside == before) == (place != "script")
    assert dict(os.environ) == environment
    os.close(readable), os.close(writable)


def test_ctrl_c_in_a_notebook_does_not_end_the_process(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: object()))
    with pytest.raises(KeyboardInterrupt), stopped_at_once(lambda: "go on with: x"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert capsys.readouterr().err == "go on with: x\n"
