"""What several tests share: a small trained network, and the scripts run as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nodes import Nodes

ROOT = Path(__file__).parent.parent


def pytest_configure():
    """The tests send signals. After `nohup`, or in the background of a script, some of them would be ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_script(tmp_path):
    """A function that runs `python SCRIPT ARGUMENTS...` in an empty folder and returns the CompletedProcess."""

    def run(script, *arguments):
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)

    return run


@pytest.fixture(scope="session")
def unet_weights(tmp_path_factory):
    """The path of the weights of a 48x64 network, trained on dark discs; 1 channel, 8 filters."""
    from unet import build_unet, dice_loss, keras, save_unet

    keras.utils.set_random_seed(1)
    model = build_unet(48, 64, filters=8)
    model.compile(keras.optimizers.Adam(1e-3), dice_loss)
    images, masks = blobs(64, 48, 64)
    model.fit((images - 128) / np.float32(50), masks, batch_size=4, epochs=8, verbose=0)
    path = tmp_path_factory.mktemp("weights") / "model.weights.h5"
    save_unet(model, path, [128.0], [50.0])
    return path


def blobs(count, height, width, seed=0):
    """Dark discs on a light background: images float32 0..255 (N, H, W, 1) and masks float32 0/1 (N, H, W, 1)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centres = rng.uniform(0.3, 0.7, (count, 2)) * (height, width)
    radii = rng.uniform(0.15, 0.3, count) * height
    masks = np.stack([np.hypot(y - cy, x - cx) < r for (cy, cx), r in zip(centres, radii)])
    images = np.where(masks, 60, 190) + rng.normal(0, 5, masks.shape)
    return images[..., None].astype(np.float32), masks[..., None].astype(np.float32)


def write_blobs(path, count, height, width):
    """A data file of such discs. The id of an image gives its position: B_0000007 is at 7."""
    from data import Row, write_dataset

    images, masks = blobs(count, height, width, seed=3)
    images, masks = images.clip(0, 255).astype(np.uint8), masks[..., 0].astype(np.uint8)
    rows = (Row(f"B_{n:07d}", "train", (height, width), images[n], masks[n]) for n in range(count))
    write_dataset(path, rows, count, height, width, 1, "discs")
    return path


@pytest.fixture
def mount(tmp_path):
    """A function (option, ...) that mounts an empty disk in memory and returns its folder. The test is skipped if this
    is not permitted."""
    folders = []

    def mount(*options):
        folder = tmp_path / f"disk_{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this process is not permitted to mount a disk")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder, *options):
    """Change the options of a disk of `mount`."""
    subprocess.run(["mount", "-o", ",".join(["remount", *options]), folder], check=True)


@pytest.fixture(scope="module")
def nodes():
    """Nodes of a Ray cluster."""
    nodes = Nodes()
    yield nodes
    nodes.ray.shutdown()


@pytest.fixture(scope="module")
def workers(nodes):
    """The Cluster of those, as this process sees it."""
    from cluster import connected

    with connected(nodes.ray.address) as nodes.workers:
        yield nodes.workers


@pytest.fixture
def free_nodes(nodes, workers):
    """The nodes, without workers of this process: those of another driver, or new ones, find room."""
    for hired in list(workers.hired):
        workers.dismiss(hired, "the test wants its place")
    return nodes
