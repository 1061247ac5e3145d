"""cluster.py: machines, played by Ray nodes of one core on this one, score a pool as one process does, whatever dies.
test_cluster_scripts.py has predict.py and reproduce.py."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from conftest import ROOT, write_blobs
from nodes import needs_ray

import ceal
import cluster
from cluster import connected
from config import read_config
from data import Dataset
from trainer import Trainer, prepare
from utils import UserError

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


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A Trainer for `IMAGES` discs, which takes some 4 seconds to score them all on one core."""
    folder = tmp_path_factory.mktemp("data")
    config = read_config(f"--preset demo --filters 8 --passes 40 --run {folder}/run".split())
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
def test_a_killed_and_a_frozen_worker_are_replaced(score, workers, monkeypatch, capsys):
    score()
    monkeypatch.setattr(cluster, "SILENCE", 9)
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
    assert "it gave no sign for 9 seconds" in errors or not others


@needs_ray
@pytest.mark.cluster
@pytest.mark.parametrize("kill", range(KILLS))
def test_a_node_killed_at_a_random_moment_changes_nothing(score, nodes, kill):
    anywhere = random.SystemRandom()  # pytest's plug-ins fix the seed of the other generators
    wait, place = anywhere.uniform(0, 5), anywhere.randrange(2)
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
        "--preset demo --data blobs.h5 --passes 60 --initial 16 --pool 270 --test 4 --iterations 1 --active-epochs 1"
    )
    command = [sys.executable, ROOT / "train.py", *f"{options} --initial-epochs 1 --run".split()]
    whole = subprocess.Popen([*command, "whole"], cwd=tmp_path)
    driver = subprocess.Popen([*command, "killed", "--cluster", free_nodes.ray.address], cwd=tmp_path)
    record = tmp_path / "killed" / ".scoring.jsonl"
    while driver.poll() is None and not (record.exists() and record.stat().st_size):
        time.sleep(0.1)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "iteration_01").exists()
    subprocess.run([*command, "killed"], cwd=tmp_path, check=True)
    assert whole.wait() == 0
    killed, whole = ((tmp_path / run / "iteration_01" / "scores.csv").read_bytes() for run in ("killed", "whole"))
    assert killed == whole


@needs_ray
@pytest.mark.cluster
def test_images_are_sent_where_the_data_file_is_another(free_nodes, score, workers, trainer, monkeypatch, capsys):
    monkeypatch.setattr(trainer.dataset, "stamp", lambda: [0, 0])
    score()
    assert "is sent the images" in capsys.readouterr().err
    assert not any(hired.reads for hired in workers.hired)


@needs_ray
@pytest.mark.cluster
def test_another_version_of_the_program_is_refused(free_nodes, trainer, workers, monkeypatch):
    monkeypatch.setattr(workers, "version", "another")
    monkeypatch.setattr(trainer, "cluster", workers, raising=False)
    with pytest.raises(UserError, match=r"no machine can be used; .* have another version than where the command was"):
        trainer.score(pool(), 1)
