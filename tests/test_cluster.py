"""cluster.py: machines, played by Ray nodes of one core on this one, do as one process does, whatever dies: they score
a pool (train.py), predict a folder of images (predict.py), and do the runs of an experiment (reproduce.py)."""

import contextlib
import importlib.util
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, blobs, write_blobs
from PIL import Image

import ceal
import cluster
from cluster import connected
from config import read_config
from data import Dataset
from trainer import Trainer, prepare
from utils import UserError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
IMAGES = 480  # of the pool: 30 pieces
KILLS = 10 if os.environ.get("LONG") else 3


# --------------------------------------------------------------------------------------------------------- without Ray


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # undone at the end: it is set for `local`
    with pytest.raises(UserError, match=r"needs Ray: pip install -r requirements-cluster\.txt"), connected("local"):
        pass
    with connected(None) as nothing:
        assert nothing is None


def test_a_cluster_that_is_not_there_is_an_error_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    for address in "127.0.0.1:1", "auto":
        with pytest.raises(UserError, match=rf"--cluster {address}: no Ray cluster answers there"), connected(address):
            pass


@pytest.mark.parametrize("options", ["--worker-cores 2", "--cluster local --worker-cores 0"])
def test_workers_without_cores_or_cluster_are_refused(options):
    with pytest.raises(UserError, match=r"--worker-cores \d: give at least 1, and --cluster with it"):
        read_config(options.split())


def test_the_version_changes_with_any_file_of_the_program(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = cluster.code_version(tmp_path)
    (tmp_path / "notes.txt").write_text("no program")
    assert cluster.code_version(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert cluster.code_version(tmp_path) != before


def test_a_failed_piece_goes_to_another_machine():
    pieces = cluster.Pieces([range(16)] * 4, long=False)
    both = {"good", "bad"}
    assert [pieces.next("bad", both, 8), pieces.next("good", both, 8)] == [0, 1]
    assert not pieces.fail(0, "bad", lost=False)
    assert pieces.next("bad", both, 8) == 2
    assert pieces.next("good", both, 8) == 0
    assert not pieces.fail(0, "good", lost=True)
    assert pieces.next("bad", {"bad"}, 8) == 0  # nobody else is left


def test_a_machine_is_blamed_for_what_others_could_do():
    pieces = cluster.Pieces([range(16)] * 9, long=False)
    for number in range(3):
        assert not pieces.fail(number, "bad", lost=False)
        assert not pieces.fail(number, "killed", lost=True)
        assert pieces.finish(number, "good")
        assert not pieces.finish(number, "good")  # not twice
    assert (pieces.blame["bad"], pieces.blame["killed"], pieces.blame["good"]) == (3, 0, 0)
    pieces.finish(3, "bad")
    assert pieces.blame["bad"] == 0


@pytest.mark.parametrize(
    ("long", "lost", "times"), [(False, False, 5), (False, True, 5), (True, False, 2), (True, True, 50)]
)
def test_a_piece_is_given_up_after_some_failures(long, lost, times):
    pieces = cluster.Pieces([range(1)] * 2, long)
    assert [pieces.fail(0, "any", lost) for _ in range(times)] == [False] * (times - 1) + [True]
    pieces.finish(1, "any")
    assert len(pieces.done) == 2


def test_no_piece_is_far_ahead_of_the_first_one_that_is_not_done():
    pieces = cluster.Pieces([range(16)] * 100, long=False)
    assert [pieces.next("one", {"one"}, 8) for _ in range(9)] == [*range(8), None]
    pieces.finish(1, "one")
    assert pieces.next("one", {"one"}, 8) is None
    pieces.finish(0, "one")
    assert [pieces.next("one", {"one"}, 8) for _ in range(3)] == [8, 9, None]


# ------------------------------------------------------------------------------------------------------ with two nodes


class Nodes:
    """A Ray cluster on this machine: a head without workers, and nodes of one core."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (else other programs slow the tests down)
        self.memory = {"object_store_memory": 80 * 2**20}
        self.ray = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self.memory})
        self.nodes = [self.add(), self.add()]

    def add(self):
        return self.ray.add_node(num_cpus=1, **self.memory)

    def kill(self, place):
        """Kill a node and its workers, as if its machine lost power."""
        self.ray.remove_node(self.nodes.pop(place), allow_graceful=False)

    @contextlib.contextmanager
    def odd(self, *mounts):
        """Add nodes of one core that see other disks: a node for each of these `mount` commands, a list."""
        start = f"ray start --address {self.ray.address} --node-ip-address 127.0.0.1 --num-cpus 1 --block"
        start = f"exec {Path(sys.executable).parent}/{start} --object-store-memory {self.memory['object_store_memory']}"
        started = []
        try:
            for mount in mounts:
                mount = shlex.join(["mount", *map(str, mount)])
                if subprocess.run(["unshare", "--mount", "sh", "-c", mount], stderr=subprocess.DEVNULL).returncode:
                    pytest.skip("this process is not permitted to mount disks")
                before, command = self.alive(), ["unshare", "--mount", "sh", "-c", f"{mount} && {start}"]
                variables = {**os.environ, "RAY_raylet_start_wait_time_s": "120"}
                started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=variables))
                while not self.alive() - before:
                    assert started[-1].poll() is None
                    time.sleep(0.5)
            yield
        finally:
            for node in started:
                node.terminate()
            for node in started:
                node.wait()

    def alive(self):
        """The ids of the nodes that are thought to live."""
        return {node["NodeID"] for node in self.workers.ray.nodes() if node["Alive"]}


@pytest.fixture(scope="module")
def nodes():
    nodes = Nodes()
    yield nodes
    nodes.ray.shutdown()


@pytest.fixture(scope="module")
def workers(nodes):
    with connected(nodes.ray.address) as nodes.workers:
        yield nodes.workers


@pytest.fixture
def free_nodes(nodes, workers):
    """The nodes, without workers of this process, so that those of another driver find room."""
    for hired in list(workers.hired):
        workers.dismiss(hired, "the test wants its place")
    return nodes


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A Trainer for `IMAGES` discs, which takes some 5 seconds to score them all on one core."""
    folder = tmp_path_factory.mktemp("data")
    config = read_config(f"--preset demo --filters 8 --passes 60 --run {folder}/run".split())
    prepare(config)
    with Dataset(write_blobs(folder / "blobs.h5", IMAGES, 48, 64)) as dataset:
        yield Trainer(config, dataset, [128.0], [50.0])


@pytest.fixture(scope="module")
def alone(trainer, tmp_path_factory):
    """What one process finds, arrays, and its record."""
    record = tmp_path_factory.mktemp("alone") / "record"
    return *trainer.score(pool(), 1, record), record.read_text()


def pool():
    return ceal.Pool([], [], np.arange(IMAGES), [])


@pytest.fixture
def score(trainer, workers, alone, tmp_path, monkeypatch):
    """A function that scores on the workers and checks that all is as with one process, the record too."""
    record = tmp_path / "record"

    def score(begun=""):
        record.write_text(begun)
        monkeypatch.setattr(trainer, "cluster", workers, raising=False)
        found = trainer.score(pool(), 1, record)
        for values, expected in zip(found, alone):
            np.testing.assert_array_equal(values, expected, strict=True)
        assert record.read_text() == alone[-1]

    return score


def process_of(workers, hired):
    """The id of a worker's process."""
    return workers.ray.get(hired.actor.__ray_call__.remote(lambda _: os.getpid()))


@needs_ray
@pytest.mark.cluster
def test_two_nodes_score_as_one_process_bit_for_bit(score, workers, capsys):
    score()
    assert sum(hired.ready and hired.reads for hired in workers.hired) >= 1
    assert "images a second" in capsys.readouterr().err


@needs_ray
@pytest.mark.cluster
def test_a_scoring_goes_on_where_one_process_or_the_cluster_left_it(score, trainer, alone, tmp_path):
    lines = alone[-1].splitlines(keepends=True)
    score("".join(lines[:17]))
    trainer.cluster, record = None, tmp_path / "record"
    record.write_text("".join(lines[:23]))
    np.testing.assert_array_equal(trainer.score(pool(), 1, record)[0], alone[0], strict=True)


@needs_ray
@pytest.mark.cluster
def test_images_are_sent_where_the_data_file_is_another(score, workers, trainer, monkeypatch, capsys):
    monkeypatch.setattr(trainer.dataset, "stamp", lambda: [0, 0])
    for hired in list(workers.hired):
        workers.dismiss(hired, "the test wants new ones")
    score()
    assert "is sent the images" in capsys.readouterr().err
    assert not any(hired.reads for hired in workers.hired)
    for hired in list(workers.hired):
        workers.dismiss(hired, "the test wants new ones")


@needs_ray
@pytest.mark.cluster
def test_a_killed_and_a_frozen_worker_are_replaced(score, workers, monkeypatch, capsys):
    score()
    monkeypatch.setattr(cluster, "SILENCE", 15)
    before = [hired for hired in workers.hired if hired.ready]
    killed, *others = [process_of(workers, hired) for hired in before]

    def strike():
        while not all(hired.ready and hired.pieces for hired in before):
            time.sleep(0.01)
        os.kill(killed, signal.SIGKILL)
        for frozen in others:
            os.kill(frozen, signal.SIGSTOP)

    threading.Thread(target=strike).start()
    score()
    errors = capsys.readouterr().err
    assert "a worker is replaced: its process or its machine ended" in errors
    assert "it gave no sign for 15 seconds" in errors or not others


@needs_ray
@pytest.mark.cluster
@pytest.mark.parametrize("kill", range(KILLS))
def test_a_node_killed_at_a_random_moment_changes_nothing(score, nodes, kill):
    anywhere = random.SystemRandom()  # pytest's plug-ins fix the seed of the other generators
    wait, place = anywhere.uniform(0, 8), anywhere.randrange(2)
    print(f"node {place} is killed after {wait:.2f} s")
    killer = threading.Timer(wait, nodes.kill, [place])
    killer.start()
    started = time.monotonic()
    score()
    assert time.monotonic() - started < 240
    killer.join()
    nodes.nodes.append(nodes.add())  # a machine that comes later is used by the next test


@needs_ray
@pytest.mark.cluster
def test_a_killed_driver_loses_nothing(free_nodes, tmp_path):
    """The run begins on the cluster, and goes on without it after the driver was killed."""
    write_blobs(tmp_path / "blobs.h5", 300, 48, 64)
    options = (
        "--preset demo --data blobs.h5 --passes 100 --initial 16 --pool 270 --test 4 --iterations 1 --active-epochs 1"
    )
    command = [sys.executable, ROOT / "train.py", *f"{options} --initial-epochs 1 --run".split()]
    driver = subprocess.Popen([*command, "killed", "--cluster", free_nodes.ray.address], cwd=tmp_path)
    record = tmp_path / "killed" / ".scoring.jsonl"
    while driver.poll() is None and not (record.exists() and record.stat().st_size):
        time.sleep(0.1)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "iteration_01").exists()
    for run in "killed", "whole":
        subprocess.run([*command, run], cwd=tmp_path, check=True)
    killed, whole = ((tmp_path / run / "iteration_01" / "scores.csv").read_bytes() for run in ("killed", "whole"))
    assert killed == whole


@needs_ray
@pytest.mark.cluster
def test_another_version_of_the_program_is_refused(trainer, workers, monkeypatch):
    for hired in list(workers.hired):
        workers.dismiss(hired, "the test wants new ones")
    monkeypatch.setattr(workers, "version", "another")
    monkeypatch.setattr(trainer, "cluster", workers, raising=False)
    with pytest.raises(UserError, match=r"no machine can be used; .* have another version than where the command was"):
        trainer.score(pool(), 1)


# ---------------------------------------------------------------------------------------------------------- predict.py


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with 150 pictures, one of them broken, and another with their true masks."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in "images", "truth":
        (folder / name).mkdir()
    for n, (image, mask) in enumerate(zip(*blobs(150, 240, 320, seed=4))):
        Image.fromarray(image[..., 0].clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{n:03d}.jpg")
        Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).save(folder / "truth" / f"{n:03d}_segmentation.png")
    (folder / "images" / "040.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def predict(photographs, unet_weights):
    """A function that starts predict.py for them, with the masks in a folder `OUT/masks`, and more options."""

    def predict(out, *options):
        out.mkdir(exist_ok=True)
        options = "--uncertainty", "--passes", "60", "--overlay", "--largest", "--weights", unet_weights, *options
        command = [
            sys.executable,
            ROOT / "predict.py",
            photographs / "images",
            "--truth",
            photographs / "truth",
            *options,
        ]
        variables = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out, env=variables
        )

    return predict


@pytest.fixture(scope="module")
def predicted(predict, tmp_path_factory):
    """What one process prints and writes."""
    out = tmp_path_factory.mktemp("predicted")
    return all_of(predict(out), out)


def all_of(process, out):
    """The exit code and standard output of predict.py, and what it wrote: a dict of name to bytes. Also its warnings
    and errors, a str."""
    said, errors = process.communicate(timeout=240)
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return (process.returncode, said, files), errors


@needs_ray
@pytest.mark.cluster
def test_two_nodes_predict_as_one_process_byte_for_byte(free_nodes, predict, predicted, tmp_path):
    """One of the nodes is lost meanwhile."""
    process = predict(tmp_path, "--cluster", free_nodes.ray.address)
    while process.poll() is None and len(list(tmp_path.rglob("*_segmentation.png"))) < 40:
        time.sleep(0.1)
    free_nodes.kill(0)
    free_nodes.nodes.append(free_nodes.add())
    found, errors = all_of(process, tmp_path)
    assert found == predicted[0], errors
    assert found[0] == 2
    assert "images a second" in errors
    assert "040.jpg: not a readable picture" in errors
    assert len(found[2]) == 3 * 149 + 2


@needs_ray
@pytest.mark.cluster
def test_a_killed_prediction_goes_on_with_or_without_a_cluster(free_nodes, predict, predicted, tmp_path):
    record = None
    for options in ("--cluster", free_nodes.ray.address), ():
        process = predict(tmp_path, *options)
        lines = len(record.read_text().splitlines()) if record else 0
        while process.poll() is None and not (record and len(record.read_text().splitlines()) >= lines + 16):
            time.sleep(0.05)
            record = next((tmp_path / "masks").glob(".predict-*.jsonl"), None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    found, errors = all_of(predict(tmp_path, "--cluster", free_nodes.ray.address), tmp_path)
    assert found == predicted[0], errors
    assert int(errors.split(" of 150 images were done before")[0].split()[-1]) >= 32


@needs_ray
@pytest.mark.cluster
def test_nodes_that_cannot_take_part_are_named(free_nodes, predict, predicted, photographs, tmp_path):
    """One lacks the images, one has another version of the program, and a disk of one is full."""
    (tmp_path / "masks" / "overlay").mkdir(parents=True)
    other = shutil.copy(ROOT / "utils.py", tmp_path.parent / f"{tmp_path.name}.py")
    with open(other, "a") as file:
        file.write("# another version\n")
    mounts = (
        ["-t", "tmpfs", "tmpfs", photographs],
        ["--bind", other, ROOT / "utils.py"],
        ["-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path / "masks" / "overlay"],
    )
    with free_nodes.odd(*mounts):
        found, errors = all_of(predict(tmp_path, "--cluster", free_nodes.ray.address), tmp_path)
    assert found == predicted[0], errors
    assert f"is not used: it does not see {photographs}/" in errors
    assert "or its packages have another version than where the command was given" in errors
    assert "No space left on device" in errors


# -------------------------------------------------------------------------------------------------------- reproduce.py

TINY = """--filters 2 --initial 12 --pool 60 --test 6 --initial-steps 40 --active-steps 30 --batch-size 4 --passes 10
--iterations 2 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 2 --pseudo-first 2 --pseudo-step 2"""


def running(folder):
    """The command lines of the processes of train.py in this folder."""
    lines = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [line for line in lines if f"--data={folder}" in line]


@needs_ray
@pytest.mark.cluster
def test_runs_go_on_after_the_driver_and_a_node_are_killed(free_nodes, tmp_path):
    data = write_blobs(tmp_path / "blobs.h5", 120, 32, 32)
    variables = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

    def reproduce(name, *options):
        command = [sys.executable, ROOT / "reproduce.py", "--out", name, "--regimes", "scarce", "--seeds", "1"]
        command += ["--arms", "random,no_distance", "--data", data, *TINY.split(), *options]
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=variables)

    def wait(process, pattern):
        while process.poll() is None and not list(tmp_path.glob(pattern)):
            time.sleep(0.1)

    driver = reproduce("res", "--cluster", free_nodes.ray.address)
    wait(driver, "runs/res/*/config.json")
    driver.kill()
    driver.wait()
    for _ in range(60):
        if not running(data):
            break
        time.sleep(1)
    assert not running(data)  # Ray ends the workers of a driver that is gone, and Linux their runs
    driver = reproduce("res", "--cluster", free_nodes.ray.address)
    wait(driver, "runs/res/*/iteration_00")
    free_nodes.kill(0)
    free_nodes.nodes.append(free_nodes.add())
    assert driver.wait(300) == 0
    assert reproduce("alone").wait(300) == 0
    written = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*")]
    compared = [path for path in written if path.suffix in (".csv", ".npz", ".md") and path.name != "history.csv"]
    assert {path.name for path in compared} >= {"table.csv", "test_dice.csv", "queries.csv", "pool_images.npz"}
    for path in compared:  # history.csv has seconds
        assert (tmp_path / "res" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes(), path
