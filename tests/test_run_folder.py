"""run_folder.py: the lock on disks of all kinds, another batch size, large pools."""

import dataclasses
import errno
import fcntl
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest

from config import Config, read_config
from run_folder import CHECKPOINT, begin, locked, read_csv, read_scores, read_selection, write_queries, write_scores
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
    pixels = np.full((2, 2, 2, 1), 7, np.uint8)
    dataset = types.SimpleNamespace(
        fingerprint=lambda: "f", stamp=lambda: [1, 2], path=Path("x.h5"), channels=1, images=lambda _: pixels
    )
    run = tmp_path / "r"
    begin(Config(run=str(run), batch_size=8), dataset, run, {}, [0, 1])
    (run / CHECKPOINT).touch()
    return run, dataset


@pytest.mark.parametrize("size", [4, 1, 16])
def test_a_run_goes_on_with_another_batch_size(begun, capsys, size):
    run, dataset = begun
    before = json.loads((run / "config.json").read_text())
    config = read_config(["--run", str(run), "--batch-size", str(size)])
    begin(config, dataset, run, {}, [0, 1])
    assert json.loads((run / "config.json").read_text()) == {**before, "batch_size": size}
    assert not (run / CHECKPOINT).exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert f"--batch-size {size}, not 8" in line
    assert "results will differ" in line
    begin(read_config(["--run", str(run)]), dataset, run, {}, [0, 1])
    assert capsys.readouterr().out == ""
    assert read_config(["--run", str(run)]).batch_size == size


def test_the_same_batch_size_keeps_the_unfinished_training(begun, capsys):
    run, dataset = begun
    before = (run / "config.json").read_bytes()
    begin(read_config(["--run", str(run), "--batch-size", "8"]), dataset, run, {}, [0, 1])
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


# ---------------------------------------------------------------------------------------------------------- large pools


def test_the_data_file_is_read_again_only_if_it_has_changed(begun):
    run, dataset = begun
    config, reads = read_config(["--run", str(run)]), []
    dataset.fingerprint = lambda: reads.append("all pixels") or "f"
    stored = begin(config, dataset, run, {}, [0, 1])
    assert (reads, stored["normalisation"]) == ([], [[7.0], [1.0]])
    dataset.stamp = lambda: [1, 3]  # touched, with the same content
    assert begin(config, dataset, run, {}, [0, 1]) == stored
    assert reads == ["all pixels"]
    dataset.fingerprint = lambda: "other"
    with pytest.raises(UserError, match=r"x\.h5 does not hold the images and masks"):
        begin(config, dataset, run, {}, [0, 1])


def test_a_run_of_an_earlier_version_goes_on(begun):
    run, dataset = begun
    path = run / "environment.json"
    path.write_text(json.dumps({"data_fingerprint": "f"}))
    stored = begin(read_config(["--run", str(run)]), dataset, run, {}, [0, 1])
    assert stored["normalisation"] == ([7.0], [1.0])


def test_scores_are_read_back_as_they_were_written(tmp_path):
    ids = np.array(["a", "b,c", 'd"e', "\udcff"], object)
    scores, dice = np.array([0.1, 1e-17, 12345678.000000001, 3.0]), np.array([np.nan, 0.0, 1.0, 2 / 3])
    write_scores(ids, scores, dice, np.array([0.1, 0.2, 0.3, 1 / 3]), tmp_path)
    write_queries(ids, {"random": [2], "pseudo": [3, 0]}, tmp_path)
    found, *numbers, groups = read_selection(tmp_path)
    assert found == ids.tolist()
    np.testing.assert_array_equal(numbers, [scores, dice])
    assert {group: at.tolist() for group, at in groups.items() if len(at)} == {"random": [2], "pseudo": [3, 0]}
    assert [row["dice"] for row in read_csv(tmp_path / "scores.csv")][:2] == ["", "0.0"]
    assert [row["agreement"] for row in read_csv(tmp_path / "scores.csv")][3] == str(1 / 3)
    assert read_scores(tmp_path / "scores.csv")[0] == ids.tolist()


def test_scores_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "scores.csv").write_text("id,uncertainty,dice\na,1.5,\nb,2.5,0.75\n")
    ids, scores, dice = read_scores(tmp_path / "scores.csv")
    assert (ids, scores.tolist(), dice[1], np.isnan(dice[0])) == (["a", "b"], [1.5, 2.5], 0.75, True)
