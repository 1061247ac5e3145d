"""What only a GPU can show: its results against a CPU's, precisions, XLA, and the programs as a user runs them.

About a minute on one GPU; `make gpu` runs it. The programs, and a CPU's results, are computed beside the tests. As a
script it writes the CPU's results: CUDA_VISIBLE_DEVICES=-1 python tests/test_gpu.py FILE.npz
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, blobs
from PIL import Image
from test_devices import with_random_weights

import sampler
from batches import restart
from devices import keras, tf
from sampler import filled_up, mc_dropout
from synthetic import draw_lesion
from trainer import training_step
from unet import PRECISIONS, build_unet, dice_bce_loss
from utils import read_csv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow finds no GPU here"),
]
WEIGHTS = ROOT / "weights" / "best.weights.h5"
LIMIT = 90  # seconds that a program may take
OPTIONS = "--initial-steps 20 --active-steps 5 --iterations 2 --pool 40 --test 10 --deterministic yes"
SHORT = ["--preset", "demo", "--run", "r", *OPTIONS.split()]


# ------------------------------------------------------------------------------------- what is compared with a CPU


def network(precision="float32"):
    return with_random_weights(build_unet(48, 64, filters=8, precision=precision))


def sampled(precision="float32", xla=False):
    """Mean and variance of passes on 20 images, which are not whole batches."""
    images = blobs(20, 48, 64)[0].clip(0, 255).astype(np.uint8)
    options = {"mean": 128, "std": 50, "batch_size": 8, "xla": xla}
    sampler._sampler.cache_clear()
    return np.array(mc_dropout(network(precision), images, passes=10, seed=3, **options))


def trained(count, xla=False):
    """The weights after three steps of gradient descent on a batch of six images, filled up to `count`, an array."""
    model, dropout_seed = network(), 5
    model.compile(keras.optimizers.SGD(0.02), dice_bce_loss, jit_compile=False)
    step, (images, masks) = training_step(model, xla), blobs(6, 48, 64, seed=1)
    batch = [filled_up((images - 128) / np.float32(50), count), filled_up(masks, count)]
    if count > 6:
        batch.append(np.float32(np.arange(count) < 6).reshape(-1, 1, 1, 1))
    for number in range(3):
        restart(model.get_layer("dropout").seed_generator, dropout_seed, number)
        step(*map(tf.constant, batch))
    return np.concatenate([values.ravel() for values in model.get_weights()])


# ---------------------------------------------------------------------------------------- what runs beside the tests


def run(folder, script, *arguments, **environment):
    """Run `python SCRIPT ARGUMENTS...` in a new folder, or in one that is there."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=LIMIT)


def killed_and_resumed(folder):
    """Kill a run after its first training, and go on with it."""
    folder.mkdir()
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, ROOT / "train.py", *SHORT]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        started = time.monotonic()
        while not (folder / "r" / "iteration_00").exists() and process.poll() is None:
            assert time.monotonic() - started < LIMIT
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (folder / "log.txt").read_text()
    return run(folder, "train.py", "--run", "r")


@pytest.fixture(scope="module", autouse=True)
def beside(tmp_path_factory):
    """A function from a name to the folder and the CompletedProcess of a program. All begin before the first test."""
    folder = tmp_path_factory.mktemp("beside")
    pictures = folder / "pictures"
    pictures.mkdir()
    for n in range(2):
        Image.fromarray(draw_lesion(np.random.default_rng(n), 300, 400)[0]).save(pictures / f"{n}.png")
    predict = ["predict.py", pictures, "--uncertainty", "--out", "masks"]
    with ThreadPoolExecutor(16) as threads:
        running = {
            name: threads.submit(function, folder / name, *arguments, **environment)
            for name, function, arguments, environment in (
                ("cpu", run, ["tests/test_gpu.py", "found.npz"], {"CUDA_VISIBLE_DEVICES": "-1"}),
                ("demo", run, ["train.py", "--preset", "demo", "--run", "r"], {}),
                ("one", run, ["train.py", *SHORT], {}),
                ("other", run, ["train.py", *SHORT], {}),
                ("killed", killed_and_resumed, [], {}),
                ("predict", run, predict, {}),
                ("predict_on_cpu", run, predict, {"CUDA_VISIBLE_DEVICES": "-1"}),
            )
        }

        def result(name):
            done = running[name].result()
            assert done.returncode == 0, done.stdout + done.stderr
            return folder / name, done

        yield result


@pytest.fixture(scope="module")
def of_a_cpu(beside):
    """The results of the section above on a CPU, a dict."""
    folder, _ = beside("cpu")
    return np.load(folder / "found.npz")


# ---------------------------------------------------------------------------------------------------- the same results


@pytest.fixture
def exact():
    """Products in float32, not in TF32."""
    was = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(was)


@pytest.mark.parametrize("xla", [False, True])
def test_mean_and_variance_are_those_of_a_cpu(exact, of_a_cpu, xla):
    expected = of_a_cpu["sampled"]
    assert expected[1].max() > 0.01
    np.testing.assert_allclose(sampled(xla=xla), expected, atol=2e-4)


@pytest.mark.parametrize("xla", [False, True])
def test_a_training_is_that_of_a_cpu(exact, of_a_cpu, capsys, xla):
    """On a batch that is filled up."""
    expected = of_a_cpu["trained"]
    assert np.abs(expected - of_a_cpu["untrained"]).max() > 0.02
    np.testing.assert_allclose(trained(8, xla), expected, atol=1e-3)
    assert "going on without" not in capsys.readouterr().err


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_near_float32(of_a_cpu, precision):
    """In float32 with TF32, as by default."""
    found, expected = sampled(precision), of_a_cpu["sampled"]
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert np.abs(found[0] - expected[0]).max() < 0.05
    assert np.abs(found[1] - expected[1]).max() < 0.05


# ------------------------------------------------------------------------------------------------------- the programs


def test_predictions_are_those_of_a_cpu(beside):
    if not WEIGHTS.exists():
        pytest.skip("weights/best.weights.h5 is not here")
    folder, done = beside("predict")
    cpu, _ = beside("predict_on_cpu")
    assert "GPU:0" in done.stdout
    assert "error" not in done.stderr
    for name in "masks/0_segmentation.png", "masks/1_segmentation.png":
        mask, same = (np.array(Image.open(path / name)) for path in (folder, cpu))
        assert mask.shape == (300, 400)
        assert (mask != same).mean() < 0.01
    scores, same = (read_csv(path / "masks" / "uncertainty" / "scores.csv") for path in (folder, cpu))
    assert [row["name"] for row in scores] == ["0", "1"]
    uncertainty, expected = ([float(row["uncertainty"]) for row in rows] for rows in (scores, same))
    np.testing.assert_allclose(uncertainty, expected, rtol=0.1)
    assert len(list((folder / "masks" / "uncertainty").glob("*.png"))) == 2


def results(folder):
    """The weights, selections, scores and metrics of a run, bit for bit."""
    names = "model.weights.h5", "queries.csv", "scores.csv", "test.csv"
    found = (path for name in names for path in folder.glob(f"r/iteration_*/{name}"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_two_programs_share_the_gpu_and_a_deterministic_run_is_repeatable(beside):
    (one, done), (other, _) = beside("one"), beside("other")
    assert "GPU:0" in done.stdout
    assert len(results(one)) == 3 + 2 + 2 + 3
    assert results(one) == results(other)


def test_a_run_that_is_killed_and_goes_on_ends_like_an_undisturbed_one(beside):
    (one, _), (killed, done) = beside("one"), beside("killed")
    assert "iterations are done already" in done.stdout
    assert results(killed) == results(one)


def test_the_demo_learns(beside):
    folder, done = beside("demo")
    assert "GPU:0" in done.stdout.splitlines()[0]
    assert "Traceback" not in done.stderr
    history = read_csv(folder / "r" / "history.csv")
    assert [row["iteration"] for row in history] == ["0", "1", "2", "3", "4"]
    assert all(float(row["dice"]) > 0.5 for row in history)
    drawn = {path.name for path in (folder / "r" / "iteration_04").glob("*.png")}
    assert drawn == {"scores.png", "examples.png"}


if __name__ == "__main__":
    untrained = np.concatenate([values.ravel() for values in network().get_weights()])
    np.savez(sys.argv[1], sampled=sampled(), trained=trained(6), untrained=untrained)
