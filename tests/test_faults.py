"""A run that is killed many times ends like an undisturbed one: same selections, history and weights, bit for bit.

KILLS=100 python -m pytest tests/test_faults.py -s     # the long version, `make faults`; the tests do 4 kills
"""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import ROOT, remount, write_blobs
from PIL import Image

import bench
import data
import predict
import train
from run_folder import read_record
from utils import UserError, read_csv, run_command

KILLS = int(os.environ.get("KILLS", 4))
OPTIONS = """
    --filters 2 --initial 9 --pool 40 --test 4 --initial-epochs 2 --active-epochs 2 --batch-size 4 --passes 2
    --iterations 3 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 2 --pseudo-first 2 --pseudo-step 2
"""


# Runs train.py and kills itself at the n-th file operation in the run's folder; prints the number of operations.
DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
folder, at, count = sys.argv[2], int(sys.argv[3]), 0
def hook(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and folder in str(arguments[0]):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = ["train.py", "--run", folder, *sys.argv[4:]]
import train, trainer, utils
trainer.Checkpoint.EVERY = 0
try:
    utils.run_command(train.main)
finally:
    print("operations", count)
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 53, 32, 32)


def start(run, *arguments, at=0):
    command = [sys.executable, "-c", DRIVER, ROOT, run, at, *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    return out


@pytest.fixture(scope="module")
def whole_run(data_file, tmp_path_factory):
    """An undisturbed run, and the number of its file operations."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    out = finish(start(run, "--data", data_file, *OPTIONS.split()))
    return run, int(out.split()[-1])


def content(run):
    """All results of a run, without the seconds."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "history.csv":
            found[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_csv(path)]
        elif path.suffix == ".csv":
            found[name] = path.read_text()
        elif path.suffix == ".h5":
            with h5py.File(path) as file:
                keys = []
                file.visit(keys.append)
                found |= {
                    f"{name}/{key}": file[key][()].tobytes() for key in keys if isinstance(file[key], h5py.Dataset)
                }
        else:
            found[name] = path.is_dir()
    return found


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_undisturbed_one(whole_run, data_file, tmp_path):
    reference, operations = whole_run
    seed = random.randrange(10**6)
    rng, kills, runs = random.Random(seed), 0, 0
    print(f"seed {seed}, {operations} file operations")
    while kills < KILLS:
        run = tmp_path / f"run_{runs}"
        while True:
            at_operation = kills < KILLS and rng.random() < 0.7
            at = rng.randrange(1, operations // 3) if at_operation else 0
            begun = (run / "config.json").exists()
            process = start(run, *([] if begun else ["--data", data_file, *OPTIONS.split()]), at=at)
            if kills < KILLS and not at_operation:
                time.sleep(rng.uniform(2, 12))
                process.kill()
            out, error = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, out + error
            kills += 1
        runs += 1
        expected, found = content(reference), content(run)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], f"seed {seed}"
    print(f"{kills} kills in {runs} runs: no difference")


@pytest.mark.slow
def test_a_finished_run_does_nothing(whole_run):
    before = content(whole_run[0])
    out = finish(start(whole_run[0]))
    assert "4 iterations are done already" in out
    assert "iteration 0:" not in out
    assert content(whole_run[0]) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_continue(data_file, tmp_path, number, code):
    run = tmp_path / "r"
    process = start(run, "--data", data_file, *OPTIONS.split(), "--initial-epochs", "100000")
    while not (run / ".training.weights.h5").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    started = time.monotonic()
    _, error = process.communicate()
    assert time.monotonic() - started < 3
    assert process.returncode == code
    assert error.splitlines()[-1] == f"stopped; go on with: python train.py --run {run}"
    assert "Traceback" not in error


def test_a_run_stopped_before_its_settings_are_written_says_to_start_again(tmp_path):
    process = start(tmp_path / "r", "--preset", "demo")
    while not list(tmp_path.glob("r/.partial-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert error.splitlines()[-1] == "stopped; nothing has been started yet; give the same command again"


@pytest.mark.slow
def test_a_second_process_is_refused(data_file, tmp_path):
    run = tmp_path / "r"
    process = start(run, "--data", data_file, *OPTIONS.split(), "--initial-epochs", "100000")
    while not (run / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    second = start(run)
    _, error = second.communicate()
    assert second.returncode == 2
    assert f"{run} is in use by process {process.pid} on " in error
    process.kill()
    process.communicate()


@pytest.fixture
def refused(monkeypatch):
    """A function that starts a run in this process and returns the message of its UserError."""

    def start_here(run, *arguments):
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(run), *map(str, arguments)])
        with pytest.raises(UserError) as refusal:
            train.main()
        return str(refusal.value)

    return start_here


@pytest.fixture
def half_run(whole_run, tmp_path):
    """A copy of the whole run as it was after iteration 1."""
    run = tmp_path / "half"
    shutil.copytree(whole_run[0], run)
    for k in (2, 3):
        shutil.rmtree(run / f"iteration_{k:02d}")
    return run


def test_other_settings_and_other_data_are_refused_by_name(refused, half_run, data_file, tmp_path):
    assert "--passes 3: " in refused(half_run, "--passes", "3")
    assert "was started with 2" in refused(half_run, "--passes", "3")
    other = tmp_path / "other.h5"
    other.write_bytes(data_file.read_bytes())
    assert f"--data {other}" in refused(half_run, "--data", other)
    before = data_file.read_bytes()
    try:
        with h5py.File(data_file, "a") as file:
            file["masks"][3] = 1 - file["masks"][3]
        assert f"{data_file} does not hold the images and masks that" in refused(half_run)
    finally:
        data_file.write_bytes(before)


def test_a_run_whose_data_file_is_not_found_is_not_told_to_download_isic(refused, half_run, data_file, tmp_path):
    stored = half_run / "config.json"
    stored.write_text(stored.read_text().replace(str(data_file), "relative.h5"))
    said = refused(half_run)
    assert f"relative.h5 does not exist here, and {half_run} was started with it" in said
    assert "in the folder where it was started" in said
    assert "download" not in said


@pytest.mark.parametrize(
    ("named", "file", "spoil"),
    [
        ("iteration_01", "queries.csv", lambda path: path.write_text("".join(path.read_text().splitlines(True)[:-2]))),
        ("iteration_01", "queries.csv", lambda path: path.write_text(path.read_text()[:-5])),
        ("iteration_00", "history.csv", lambda path: path.write_text(path.read_text()[:20])),
        ("iteration_00", "history.csv", lambda path: path.write_text(path.read_text() + "9" * 200000)),  # csv.Error
        ("iteration_01/model.weights.h5", "", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("iteration_01/model.weights.h5", "", lambda path: path.write_text("no weights")),
        ("config.json", "", lambda path: path.write_text(path.read_text()[:50])),
    ],
)
def test_a_damaged_run_is_refused_by_name(refused, half_run, named, file, spoil):
    spoil(half_run / named / file)
    assert f"{half_run / named}: " in refused(half_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [".training.weights.h5", "iteration_01/model.weights.h5", "annotations.h5", "data"])
def test_a_file_that_is_open_elsewhere_is_not_called_damaged(refused, half_run, data_file, tmp_path, name):
    """The advice for a damaged file would make the person throw it away."""
    path = data_file if name == "data" else half_run / name
    if name.startswith("."):
        shutil.copy(half_run / "iteration_01" / "model.weights.h5", path)
    if name == "annotations.h5":
        h5py.File(path, "w").close()
        settings = (half_run / "config.json").read_text().replace('"oracle": "simulated"', '"oracle": "folder"')
        (half_run / "config.json").write_text(settings)
    with open(path, "rb") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        message = refused(half_run)
    assert message == f"{path} is open in another program; close it there and repeat the command"


def test_a_gap_in_the_iterations_is_refused_by_name(refused, half_run):
    """A network trained to fill the gap would differ from the one that the later iterations used."""
    (half_run / "iteration_00").rename(half_run / "iteration_00_old")
    assert f"{half_run / 'iteration_00'} is missing, and later ones are there" in refused(half_run)


@pytest.mark.slow
def test_a_truncated_history_is_rewritten(half_run, whole_run):
    (half_run / "history.csv").write_text("iteration,anno")
    finish(start(half_run))
    assert content(half_run) == content(whole_run[0])


@pytest.mark.slow
def test_a_repeated_iteration_does_not_use_an_old_selection(half_run, whole_run):
    """An old selection remains if a run is stopped in an iteration and the iteration before is then moved away."""
    shutil.copytree(half_run / "iteration_01", half_run / ".queries_03")
    finish(start(half_run))
    assert content(half_run) == content(whole_run[0])


@pytest.mark.slow
def test_all_iterations_can_be_moved_away_and_are_done_anew(half_run, whole_run):
    for folder in half_run.glob("iteration_*"):
        folder.rename(half_run.with_name(folder.name))
    finish(start(half_run))
    assert content(half_run) == content(whole_run[0])


def test_force_moves_nothing_but_a_run(refused, data_file, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    assert "thesis exists already and is not a run" in refused(tmp_path / "thesis", "--data", data_file, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.slow
def test_force_moves_the_old_run_aside(half_run, data_file):
    before = content(half_run)
    finish(start(half_run, "--data", data_file, *OPTIONS.split(), "--iterations", "0", "--force"))
    assert len(read_csv(half_run / "history.csv")) == 1
    (aside,) = half_run.parent.glob("half-*")
    assert content(aside) == before


@pytest.mark.parametrize(("inside", "name"), [(".", "."), ("iteration_00", "..")])
def test_force_does_not_move_the_current_folder(refused, half_run, monkeypatch, inside, name):
    monkeypatch.chdir(half_run / inside)
    assert "contains the current folder" in refused(name, "--force")
    assert half_run.is_dir()


# -------------------------------------------------------------------------------------------- full and read-only disks


# For each kind of file: fills the disk, or lets no file grow, when such a file is first opened; then starts again.
FULL_DISK = """
import os, resource, shutil, sys
from pathlib import Path
root, folder, ballast, kinds, *arguments = sys.argv[1:]
kinds, hard = kinds.split(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def fill():
    if ballast == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        return
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(Path(ballast).parent).free)
def empty():
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    Path(ballast).unlink(missing_ok=True)
def hook(event, arguments):
    global armed
    if event == "open" and armed and armed in str(arguments[0]) and set(str(arguments[1])) & set("wa"):
        armed = ""
        fill()
armed = ""
sys.addaudithook(hook)
sys.argv = ["train.py", "--run", folder, *arguments]
sys.path.insert(0, root)
import train, trainer, utils
trainer.Checkpoint.EVERY = 0
for kind in [*kinds, ""]:
    armed = kind
    try:
        utils.run_command(train.main)
    except SystemExit as stopped:
        assert bool(stopped.code) == bool(kind), (kind, stopped.code)
    empty()
    assert not armed, kind
    assert not list(Path(folder).rglob(".partial-*")), kind
"""
# In the order in which a run writes them, so that every start fails once and needs no further start.
KINDS = """
    environment.json config.json .training.weights.h5 partial-model.weights.h5
    .partial-iteration_00/.partial-history.csv r/.partial-history.csv dice.png
    .scoring.jsonl scores.csv queries.csv scores.png examples.png
    .partial-iteration_01/.partial-model.weights.h5
"""


@pytest.fixture
def ballast(request, tmp_path):
    """The folder for a run, and the file that fills its disk, or the word `limit` if no small disk can be mounted."""
    try:
        disk = request.getfixturevalue("mount")("size=4m")
    except pytest.skip.Exception:
        return tmp_path, "limit"
    return disk, disk / "ballast"


@pytest.mark.slow
def test_a_run_whose_disk_is_full_says_so_and_continues_later(ballast, whole_run, data_file, tmp_path):
    folder, filler = ballast
    run, options = folder / "r", ["--data", data_file, *OPTIONS.split(), "--iterations", "1"]
    command = [sys.executable, "-c", FULL_DISK, ROOT, run, filler, " ".join(KINDS.split()), *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    reason = "File too large" if filler == "limit" else "No space left on device"
    assert len(errors) == len(KINDS.split()), done.stderr
    for kind, error in zip(KINDS.split(), errors):
        assert error.startswith(f"error: {run}"), kind
        assert error.endswith(f"{reason}; free some space and repeat the command"), kind
        assert kind.split("/")[-1].split("partial-")[-1] in error
    found, expected = content(run), content(whole_run[0])
    for iteration in "iteration_00/", "iteration_01/":
        names = [name for name in expected if name.startswith(iteration)]
        assert [name for name in names if found[name] != expected[name]] == []
    assert found["history.csv"] == expected["history.csv"][:2]


@pytest.fixture
def told(monkeypatch, capsys):
    """A function that runs a command in this process, expects it to fail without a partial file in `folder`, and
    returns its one-line message."""

    def run(folder, script, *arguments):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_command(script.main)
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n"), error[:7]) == (2, 1, "error: "), error
        assert not list(folder.rglob(".partial-*"))
        return error

    return run


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures of noise, whose overlays take 480 kB each."""
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{n}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("size", ["4k", "8k", "500k", "900k"])
def test_predictions_on_a_full_disk_are_complete_or_absent(told, mount, pictures, unet_weights, monkeypatch, size):
    disk = mount(f"size={size}")
    arguments = pictures, "--weights", unet_weights, "--out", disk / "out", "--overlay", "--uncertainty", "--passes", 2
    error = told(disk, predict, *arguments)
    assert f"error: {disk}/out/" in error
    assert "No space left on device; free some space and repeat the command" in error
    for path in disk.rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, len(picture.tobytes())) == ((400, 400), 160_000 * len(picture.getbands()))
    remount(disk, "size=8m")
    assert predict.main() == 0
    assert len(list(disk.rglob("*.png"))) == 9


def test_a_data_file_on_a_full_disk_is_refused(told, mount, data_file, monkeypatch):
    disk = mount("size=40k")
    command = "synthetic", disk / "x.h5", "--images", 9, "--height", 32, "--width", 32
    assert f"error: {disk} has 0.0 MB free and x.h5 needs 0.1 MB" in told(disk, data, *command)
    assert f"error: {disk}/x.png cannot be" in told(disk, data, "show", data_file, disk / "x.png")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    assert f"error: {disk}/x.h5 cannot be read or written" in told(disk, data, *command)
    assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_named(told, mount, half_run, data_file, pictures, unet_weights):
    disk = mount("size=8m")
    shutil.copytree(half_run, disk / "half")
    remount(disk, "ro")
    for script, named, *arguments in (
        (train, "half/.lock", "--run", disk / "half"),
        (train, "new", "--run", disk / "new", "--data", data_file, *OPTIONS.split()),
        (train, "half/.lock", "--run", disk / "half", "--data", data_file, *OPTIONS.split(), "--force"),
        (predict, "", pictures, "--weights", unet_weights, "--out", disk),
        (predict, "out", pictures, "--weights", unet_weights, "--out", disk / "out"),
        (data, "x.h5", "synthetic", disk / "x.h5", "--images", 3),
        (data, "new", "synthetic", disk / "new" / "x.h5", "--images", 3),
        (data, "x.png", "show", data_file, disk / "x.png"),
        (bench, "", "--json", disk / "x.json"),
    ):
        error = told(disk, script, *arguments)
        assert f"error: {disk / named}" in error
        assert "Read-only file system; fix this, or use another path" in error
    assert content(disk / "half") == content(half_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("environment.json", lambda path: path.write_text(path.read_text()[:40]), "not as train.py wrote it"),
        ("environment.json", lambda path: path.unlink(), "not as train.py wrote it"),
        ("environment.json", lambda path: path.write_text("[]"), "not as train.py wrote it"),
        (".training.weights.h5", lambda path: path.write_text("no weights"), "damaged"),
        (".training.weights.h5", lambda path: h5py.File(path, "w").attrs.update(iteration=2, steps=1), "damaged"),
    ],
)
def test_a_damaged_file_of_an_unfinished_run_is_named(refused, half_run, name, spoil, said):
    spoil(half_run / name)
    assert f"{half_run / name}: {said}" in refused(half_run)


OLDER = "[2, [0.5], [0.5]]\n"  # of a version that recorded only scores and Dice: this scoring begins again


@pytest.mark.parametrize(
    "line", ["[2, [0.5], [0.5]", "5", "null", '{"a": 1}', "\x00\x00", "[1, [1], [1], [1], [1]]\n", OLDER]
)
def test_a_damaged_scoring_record_is_cut(tmp_path, line):
    record = tmp_path / "record"
    whole = "[2, [0.25], [0.75], [7], [0.5]]\n"
    record.write_text(whole + line)
    assert read_record(record, 2) == [[[0.25], [0.75], [7], [0.5]]]
    assert record.read_text() == whole
