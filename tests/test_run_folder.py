"""run_folder.py: the lock on disks of all kinds, another batch size."""

import dataclasses
import errno
import fcntl
import json
import os
import types
from pathlib import Path

import pytest

from config import Config, read_config
from run_folder import CHECKPOINT, begin, locked
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
