"""run_folder.py: the lock on disks of all kinds, output that nobody reads, signals, notebooks, another batch size."""

import dataclasses
import errno
import fcntl
import json
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
from config import Config, read_config
from run_folder import CHECKPOINT, begin, locked, outlasting_output, stopped_at_once
from utils import UserError


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EACCES, errno.EIO, 524])
def test_a_disk_without_locks_gets_one_warning(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    for _ in range(2):
        with locked(tmp_path / "r"):
            (tmp_path / "r" / "config.json").touch()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path / 'r'}: its disk has no locks")
    assert "only once at a time" in warning


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_of_another_process_is_respected_whatever_the_disk_calls_it(tmp_path, monkeypatch, number):
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    taken, lockf = (tmp_path / ".lock").stat().st_ino, fcntl.lockf

    def lockf_of_disk(file, *arguments):
        if os.fstat(file.fileno()).st_ino == taken:
            raise OSError(number, os.strerror(number))
        return lockf(file, *arguments)

    monkeypatch.setattr(fcntl, "lockf", lockf_of_disk)
    with pytest.raises(UserError, match="is in use by process 7 on elsewhere; wait"), locked(tmp_path):
        pass


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
from run_folder import stopped_at_once
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


# -------------------------------------------------------------------------------------------------- another batch size


@pytest.fixture
def begun(tmp_path):
    """A run with a batch size of 8 and an unfinished training, and a data set that goes with it."""
    dataset = types.SimpleNamespace(fingerprint=lambda: "f", path=Path("x.h5"))
    run = tmp_path / "r"
    begin(Config(run=str(run), batch_size=8), dataset, run, {})
    (run / CHECKPOINT).touch()
    return run, dataset


@pytest.mark.parametrize("size", [4, 1, 16])
def test_a_run_goes_on_with_another_batch_size(begun, capsys, size):
    run, dataset = begun
    before = json.loads((run / "config.json").read_text())
    config = read_config(["--run", str(run), "--batch-size", str(size)])
    begin(config, dataset, run, {})
    assert json.loads((run / "config.json").read_text()) == {**before, "batch_size": size}
    assert not (run / CHECKPOINT).exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert f"--batch-size {size}, not 8" in line
    assert "results will differ" in line
    begin(read_config(["--run", str(run)]), dataset, run, {})
    assert capsys.readouterr().out == ""
    assert read_config(["--run", str(run)]).batch_size == size


def test_the_same_batch_size_keeps_the_unfinished_training(begun, capsys):
    run, dataset = begun
    before = (run / "config.json").read_bytes()
    begin(read_config(["--run", str(run), "--batch-size", "8"]), dataset, run, {})
    assert (run / CHECKPOINT).exists()
    assert (run / "config.json").read_bytes() == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("size", "said"), [("0", "must be at least 1"), ("-3", "must be at least 1")])
def test_an_impossible_batch_size_changes_nothing(begun, size, said):
    run, _ = begun
    with pytest.raises(UserError, match=f"--batch-size {size}: {said}"):
        read_config(["--run", str(run), "--batch-size", size])
    assert json.loads((run / "config.json").read_text())["batch_size"] == 8


@pytest.mark.parametrize("option", [["--filters", "3"], ["--passes", "7"], ["--learning-rate", "1"]])
def test_all_other_settings_stay_fixed(begun, option):
    with pytest.raises(UserError, match=f"{option[0]} .*was started with"):
        read_config(["--run", str(begun[0]), "--batch-size", "4", *option])
    assert dataclasses.asdict(read_config(["--run", str(begun[0])]))["batch_size"] == 8
