"""predict.py and reproduce.py on a Ray cluster of two nodes, played by this machine, do as one process does, whatever
dies and whatever a node lacks."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, blobs, write_blobs
from nodes import needs_ray
from PIL import Image

pytestmark = [needs_ray, pytest.mark.cluster]


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
        options = "--uncertainty", "--passes", "40", "--overlay", "--largest", "--weights", unet_weights, *options
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
    """A function that returns what one process prints and writes; it works meanwhile."""
    out = tmp_path_factory.mktemp("predicted")
    process = predict(out)
    return functools.cache(lambda: all_of(process, out)[0])


def all_of(process, out):
    """The exit code and standard output of predict.py, and what it wrote: a dict of name to bytes. Also its warnings
    and errors, a str."""
    said, errors = process.communicate(timeout=240)
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return (process.returncode, said, files), errors


def test_a_prediction_on_two_nodes_ends_as_one_process_whatever_is_killed(free_nodes, predict, predicted, tmp_path):
    """The driver is killed twice, once without a cluster, and at last a node."""
    record = None
    for options in ("--cluster", free_nodes.ray.address), ():
        process = predict(tmp_path, *options)
        lines = len(record.read_text().splitlines()) if record else 0
        while process.poll() is None and not (record and len(record.read_text().splitlines()) >= lines + 16):
            time.sleep(0.05)
            record = next((tmp_path / "masks").glob(".predict-*.jsonl"), None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = len(list(tmp_path.rglob("*_segmentation.png")))
    process = predict(tmp_path, "--cluster", free_nodes.ray.address)
    while process.poll() is None and len(list(tmp_path.rglob("*_segmentation.png"))) < done + 16:
        time.sleep(0.1)
    free_nodes.kill(0)
    free_nodes.nodes.append(free_nodes.add())
    found, errors = all_of(process, tmp_path)
    assert found == predicted(), errors
    assert found[0] == 2
    assert "images a second" in errors
    assert "040.jpg: not a readable picture" in errors
    assert len(found[2]) == 3 * 149 + 2
    assert int(errors.split(" of 150 images were done before")[0].split()[-1]) >= 32


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
    assert found == predicted(), errors
    assert f"is not used: it does not see {photographs}/" in errors
    assert "or its packages have another version than where the command was given" in errors
    assert "No space left on device" in errors


# -------------------------------------------------------------------------------------------------------- reproduce.py

TINY = """--filters 2 --initial 12 --pool 60 --test 6 --initial-steps 40 --active-steps 30 --batch-size 4 --passes 10
--iterations 1 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 1 --pseudo-first 2 --pseudo-step 2"""


def running(data, out):
    """The command lines of the processes of train.py with this data file whose runs are in runs/OUT."""
    lines = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [line for line in lines if f"--data={data}" in line and f"--run=runs/{out}/" in line]


def test_runs_go_on_after_the_driver_and_a_node_are_killed(free_nodes, tmp_path):
    data = write_blobs(tmp_path / "blobs.h5", 120, 32, 32)
    variables = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

    def reproduce(name, *options):
        command = [sys.executable, ROOT / "reproduce.py", "--out", name, "--regimes", "scarce", "--seeds", "1"]
        command += ["--arms", "random,no_distance", "--data", data, *TINY.split(), *options]
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=variables)

    alone = reproduce("alone")
    driver = reproduce("res", "--cluster", free_nodes.ray.address)
    while driver.poll() is None and not running(data, "res"):
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    for _ in range(60):
        if not running(data, "res"):
            break
        time.sleep(1)
    assert not running(data, "res")  # Ray ends the workers of a driver that is gone, and Linux their runs
    driver = reproduce("res", "--cluster", free_nodes.ray.address)
    while driver.poll() is None and not list(tmp_path.glob("runs/res/*/iteration_00")):
        time.sleep(0.1)
    free_nodes.kill(0)
    free_nodes.nodes.append(free_nodes.add())
    assert [driver.wait(300), alone.wait(300)] == [0, 0]
    written = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*")]
    compared = [path for path in written if path.suffix in (".csv", ".npz", ".md") and path.name != "history.csv"]
    assert {path.name for path in compared} >= {"table.csv", "test_dice.csv", "queries.csv", "pool_images.npz"}
    for path in compared:  # history.csv has seconds
        assert (tmp_path / "res" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes(), path
