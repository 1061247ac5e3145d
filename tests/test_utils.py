"""utils.py: metrics against scikit-learn and the challenge's scorer, atomic writes, order, seeds, errors."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
import sklearn.metrics
from isic_challenge_scoring.confusion import create_binary_confusion_matrix
from isic_challenge_scoring.segmentation import metrics as challenge

import utils
from data import Dataset
from utils import (
    FileInUse,
    UserError,
    derived_seed,
    expected_agreement,
    map_in_order,
    open_hdf5,
    reserve,
    run_command,
    segmentation_metrics,
    track,
    whole_file,
    whole_folder,
    write_csv,
)


def random_masks(count=30, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random((count, 12, 10)) < rng.random((count, 1, 1))
    prediction = truth ^ (rng.random(truth.shape) < rng.random((count, 1, 1)) * 0.5)
    prediction[0], truth[1], prediction[1] = False, True, True  # an empty prediction; lesion everywhere
    truth[2], prediction[2] = False, False  # both empty
    return truth, prediction


def test_metrics_equal_those_of_the_challenges_scorer():
    truth, prediction = random_masks()
    ours = segmentation_metrics(truth, prediction)
    for n, pair in enumerate(zip(truth, prediction)):
        confusion = create_binary_confusion_matrix(*pair, name=str(n))
        for name, values in ours.items():
            assert values[n] == pytest.approx(getattr(challenge, f"binary_{name}")(confusion), abs=1e-12), name


def test_metrics_equal_those_of_scikit_learn():
    truth, prediction = random_masks(20, seed=1)
    ours = segmentation_metrics(truth.astype(np.uint8), prediction.astype(np.uint8))
    for n in range(3, 20):
        pair = truth[n].ravel(), prediction[n].ravel()
        assert ours["dice"][n] == pytest.approx(sklearn.metrics.f1_score(*pair))
        assert ours["jaccard"][n] == pytest.approx(sklearn.metrics.jaccard_score(*pair))
        assert ours["sensitivity"][n] == pytest.approx(sklearn.metrics.recall_score(*pair))
        assert ours["specificity"][n] == pytest.approx(
            sklearn.metrics.recall_score(*pair, pos_label=False, zero_division=1)
        )
        assert ours["accuracy"][n] == pytest.approx(sklearn.metrics.accuracy_score(*pair))


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    write_csv(path, ["a", "b"], [(1, 2)])
    assert path.read_text().split() == ["a,b", "1,2"]
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text().split() == ["a,b", "1,2"]
    assert [p.name for p in path.parent.iterdir()] == ["x.csv"]


def test_a_folder_is_complete_or_absent(tmp_path):
    path = tmp_path / "iteration_01"
    with pytest.raises(ZeroDivisionError), whole_folder(path) as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".partial-iteration_01").mkdir()  # left by a process that was killed
    (tmp_path / ".partial-iteration_01" / "old").write_text("")
    with whole_folder(path) as partial:
        (partial / "a").write_text("whole")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_01"]
    assert [p.name for p in path.iterdir()] == ["a"]


def test_map_in_order_keeps_the_order_and_bounds_the_work_in_progress():
    taken, release = [], threading.Event()

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    def wait(n):
        release.wait(5)
        return -n

    results = map_in_order(wait, items(), workers=3)
    threading.Timer(0.2, release.set).start()
    assert next(results) == 0
    assert len(taken) < 10
    assert list(results) == [-n for n in range(1, 1000)]


def test_an_error_in_a_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda n: 1 / n, [2, 1, 0]))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = [derived_seed(seed, k, what) for seed in (1, 2) for k in range(10) for what in ("queries", "passes")]
    assert len(set(seeds)) == 40
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(1, 2, "queries") == 426_851_214  # must never change, or runs cannot be repeated


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.jpg: is bad; get another"), 2, "error: a.jpg: is bad; get another\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.h5"),
            2,
            "out.h5 cannot be read or written: No space left",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_an_exit_code(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == code
    stderr = capsys.readouterr().err
    assert said in stderr
    assert stderr.count("\n") == 1


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


# -------------------------------------------------------------------------------------------- output, signals, notebook


@pytest.fixture
def closed_pipe():
    """A text stream into a pipe that nothing reads."""
    readable, writable = os.pipe()
    os.close(readable)
    with open(writable, "w") as stream:
        yield stream


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("code", [0, 2])
def test_a_closed_pipe_ends_a_command_quietly(closed_pipe, monkeypatch, capfd, flush, code):
    def main():
        print("x", flush=flush)
        return code

    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 128 + signal.SIGPIPE
    closed_pipe.flush()  # as Python does at its end
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["data.py", "--help"], ["predict.py", "--help"], ["data.py", "isic", "missing", "x"]]
)
def test_a_process_whose_output_is_not_read_ends_quietly(arguments):
    readable, writable = os.pipe()
    os.close(readable)
    root = os.path.dirname(utils.__file__)
    command = [sys.executable, os.path.join(root, arguments[0]), *arguments[1:]]
    done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, text=True)
    os.close(writable)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_command_removes_its_partial_files(tmp_path, capsys, number):
    def main():
        with whole_file(tmp_path / "x") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(5)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 128 + number
    assert capsys.readouterr().err == "stopped\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_after_nohup_a_command_goes_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as exit:
            run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert exit.value.code is None


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE"])
def test_no_bar_is_written_into_a_file(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    assert list(track([1, 2, 3], "steps")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


class Plain:
    """A stream of a notebook: it lacks reconfigure, fileno and isatty."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [Plain, io.StringIO, lambda: None])
def test_a_command_runs_with_the_streams_of_a_notebook(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    done = []
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: done.extend(track([1, 2], "steps")))
    assert exit.value.code is None
    assert done == [1, 2]


# ------------------------------------------------------------------------------------------------------ kinds of disks


def failing(call, number, only=lambda *_: True):
    """A system call that fails with this errno where `only` says so."""

    def fail(*arguments):
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return fail


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.EACCES])
def test_a_disk_whose_folders_cannot_be_synced_takes_files_and_folders(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, number, is_folder))
    write_csv(tmp_path / "x.csv", ["a"], [(1,)])
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "a").write_text("whole")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "folder", "inside", "x.csv"]


def test_a_file_that_cannot_be_synced_is_an_error_and_a_disk_without_sync_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EINVAL))
    write_csv(tmp_path / "x.csv", ["a"], [(1,)])
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
    with pytest.raises(OSError, match="Input/output error") as error:
        write_csv(tmp_path / "y.csv", ["a"], [(1,)])
    assert error.value.filename == str(tmp_path / "y.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 7])
def test_room_is_reserved_on_a_disk_without_fallocate(tmp_path, monkeypatch, number, size):
    monkeypatch.setattr(os, "posix_fallocate", failing(None, number))
    reserve(tmp_path / "x", size)
    assert (tmp_path / "x").stat().st_size == size
    assert (tmp_path / "x").stat().st_blocks * 512 >= size


def test_a_full_disk_stays_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(None, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as error:
        reserve(tmp_path / "x", 100)
    assert error.value.filename == str(tmp_path / "x")


# ------------------------------------------------------------------------------------- HDF5 files that others have open


@pytest.fixture
def hdf5(tmp_path):
    path = tmp_path / "x y.h5"
    with h5py.File(path, "w") as file:
        file["a"] = 5
    return path


OPENER = """
import h5py, sys, time
file = h5py.File(sys.argv[1], *eval(sys.argv[2]))
file.flush()
print("open", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("options", ["('r+',)", "('w', None, 'latest')"])
def test_a_file_that_another_program_writes_to_is_not_called_damaged(hdf5, options, killed):
    writer = subprocess.Popen([sys.executable, "-c", OPENER, hdf5, options], stdout=subprocess.PIPE)
    writer.stdout.readline()
    if killed:
        writer.kill()
        writer.wait()
    try:
        if killed and "r+" in options:  # no mark is left
            assert open_hdf5(hdf5)["a"][()] == 5
            return
        with pytest.raises(FileInUse) as error:
            Dataset(hdf5)
    finally:
        writer.kill()
        writer.wait()
    assert str(hdf5) in str(error.value)
    assert "damaged" not in str(error.value)
    if killed:
        assert f"`h5clear -s '{hdf5}'`" in str(error.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524, errno.EACCES])
@pytest.mark.parametrize("readable", [True, False])
def test_a_disk_without_locks_is_read(hdf5, monkeypatch, number, readable):
    File, tried = h5py.File, []

    def without_locks(path, locking=None):
        tried.append(locking)
        if locking is None or not readable:
            raise OSError(
                f"Unable to synchronously open file (unable to lock file, errno = {number}, error message = '')"
            )
        return File(path)

    monkeypatch.setattr(h5py, "File", without_locks)
    if readable:
        with open_hdf5(hdf5) as file:
            assert file["a"][()] == 5
    else:
        with pytest.raises(FileInUse, match="is open in another program; close it there"):
            open_hdf5(hdf5)
    assert tried == [None, False]


def test_the_expected_agreement_is_the_dice_of_two_drawn_masks():
    rng = np.random.default_rng(0)
    probability = rng.random((3, 40, 50)) ** np.array([1, 4, 0.2])[:, None, None]
    one, other = (rng.random((200, 3, 40, 50)) < probability for _ in range(2))
    drawn = [segmentation_metrics(one[:, n], other[:, n])["dice"].mean() for n in range(3)]
    np.testing.assert_allclose(expected_agreement(probability), drawn, atol=0.01)
    certain = np.zeros((2, 8, 8), np.float32)
    certain[0, 2:5] = 1
    assert expected_agreement(certain).tolist() == [1, 1]
