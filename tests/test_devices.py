"""devices.py, and the ways of a GPU in sampler.py, batches.py and trainer.py: the results are those of a CPU.

All of it runs on a CPU that is taken for a GPU. tests/test_gpu.py needs a GPU.
"""

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import blobs, write_blobs
from tensorflow.python.framework import config as tf_config  # the public one cannot switch determinism off

import ceal
import devices
import sampler
import trainer
from config import PRESETS, Config, read_config
from data import Dataset
from devices import tf
from sampler import mc_dropout
from trainer import Checkpoint, Trainer, images_at_a_time, xla_pays
from unet import build_unet, halves, kept_units, kept_units_of_images

MEMORY, LITTLE = 8e9, 1.0  # bytes of a GPU that holds all images, and of one that holds none
NEVER = 10**9


@pytest.fixture
def kept_determinism():
    """Undo at the end what a test says about deterministic operations, which train.py switches on on a CPU."""
    was = tf_config.is_op_determinism_enabled()
    yield
    tf.config.experimental.enable_op_determinism() if was else tf_config.disable_op_determinism()


@pytest.fixture
def work_as_on_a_gpu(monkeypatch):
    """A function that lets the rest of a test work as on a GPU with this memory, with XLA or without it."""

    def change(memory=MEMORY, xla=False):
        for module in devices, sampler, trainer:
            monkeypatch.setattr(module, "on_gpu", lambda: True)
        for module in devices, trainer:
            monkeypatch.setattr(module, "gpu_memory", lambda: memory)
        for name in "XLA_STEPS", "XLA_PASSES":
            monkeypatch.setattr(trainer, name, 0 if xla else NEVER)
        sampler._sampler.cache_clear()

    sampler._sampler.cache_clear()
    yield change
    sampler._sampler.cache_clear()


@pytest.fixture(scope="module")
def network():
    return random_network(32, 48, filters=3)


def random_network(*size, **options):
    """A network with weights whose passes differ, the same on every device."""
    return with_random_weights(build_unet(*size, **options))


def with_random_weights(model, gain=2.6):
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        *inputs, _ = variable.shape
        scale = np.sqrt(gain / np.prod(inputs)) if inputs else 0.05
        variable.assign(scale * rng.normal(size=variable.shape))
    return model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """48 dark discs at 48x64."""
    path = write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 48, 48, 64)
    with Dataset(path) as dataset:
        yield dataset


@pytest.fixture
def new_trainer(dataset, tmp_path):
    """A function (options, run) that makes a Trainer of a small network."""

    def new(options="", run="r"):
        (tmp_path / run).mkdir(exist_ok=True)
        tiny = "--filters 2 --batch-size 4 --initial-epochs 2 --active-epochs 2 --learning-rate 1e-3"
        arguments = f"--data {dataset.path} --run {tmp_path / run} {tiny} {options}".split()
        return Trainer(read_config(arguments), dataset, [128.0], [50.0])

    return new


@pytest.fixture
def labelled(dataset):
    """Ten positions in no order, so that epochs have batches of 3, 3 and 4 images, and labels, of which some are
    soft."""
    positions = np.random.default_rng(5).permutation(len(dataset))[:10]
    labels = [mask if n % 3 else 0.1 + 0.7 * mask for n, mask in enumerate(dataset.masks(positions))]
    return positions, labels


# ------------------------------------------------------------------------------------------------ networks and passes


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(("rate", "shape"), [(0.5, (3, 4, 9)), (0.3, (5, 7, 3)), (0.85, (1, 1, 6)), (0.1, (2, 2, 1))])
def test_the_masks_of_many_images_are_those_of_each(rate, shape, xla):
    """The number of units is not always a multiple of 4, of which Philox draws a block."""
    images = [0, 3, -7, 2**32 - 1, 2**32, 2**33 + 5, 2**60, -(2**63), 2**63 - 1]
    seeds = tf.constant([[image, number] for image in images for number in (0, 4, 2**40)], tf.int64)
    draw = tf.function(lambda seeds: kept_units_of_images(shape, rate, seeds), jit_compile=xla)
    found = draw(seeds).numpy()
    np.testing.assert_array_equal(found, [kept_units(shape, rate, seed) for seed in seeds])
    assert len({mask.tobytes() for mask in found}) > 1


def test_the_masks_of_no_image_are_empty():
    assert kept_units_of_images((3, 4, 9), 0.5, tf.zeros((0, 2), tf.int64)).shape == (0, 3, 4, 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_halves_are_the_whole_network(channels):
    model = random_network(32, 48, channels=channels, filters=3)
    images = np.random.default_rng(0).normal(size=(3, 32, 48, channels)).astype("f")
    encode, decode = halves(model, on_gpu=True)
    found = decode(*encode(images)).numpy()
    np.testing.assert_allclose(found, model(images, training=False), atol=1e-5)
    assert np.ptp(found) > 0.1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_halves_in_half_precision_are_near_those_of_a_cpu(precision):
    model = random_network(32, 48, filters=3, precision=precision)
    images = np.random.default_rng(0).normal(size=(3, 32, 48, 1)).astype("f")
    cpu, gpu = (decode(*encode(images)) for encode, decode in (halves(model, on_gpu) for on_gpu in (False, True)))
    assert gpu.dtype == cpu.dtype == tf.float32
    assert gpu.shape == cpu.shape
    np.testing.assert_allclose(gpu, cpu, atol=0.03)


@pytest.fixture(scope="module")
def images():
    """Seven images for a batch size of 3."""
    return blobs(7, 32, 48, seed=4)[0].clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("measure", "xla"), [("variance", False), ("entropy", False), ("bald", False), ("bald", True)])
def test_the_passes_are_those_of_a_cpu(network, images, work_as_on_a_gpu, measure, xla):
    options = {"passes": 5, "seed": 3, "mean": 128, "std": 50, "measure": measure}
    expected = mc_dropout(network, images, **options)
    work_as_on_a_gpu()
    found = mc_dropout(network, images, batch_size=3, xla=xla, **options)
    for a, b in zip(found, expected):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert expected[1].max() > 1e-3
    if xla:
        alone = mc_dropout(network, images[6:], batch_size=3, xla=True, **options)
        np.testing.assert_allclose(alone, np.array(expected)[:, 6:], atol=1e-5)
        assert mc_dropout(network, images[:0], batch_size=3, xla=True, **options)[0].shape == (0, 32, 48)


def test_the_passes_of_any_network_are_those_of_a_cpu(network, images, work_as_on_a_gpu, monkeypatch):
    expected = mc_dropout(network, images, 3, seed=3, mean=128, std=50)
    monkeypatch.setattr(sampler, "_is_build_unet", lambda model: False)
    work_as_on_a_gpu()
    np.testing.assert_allclose(mc_dropout(network, images, 3, seed=3, mean=128, std=50), expected, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize(
    ("options", "memory"),
    [("", MEMORY), ("", LITTLE), ("--augmentation wild --artefacts 0.7", LITTLE)],
    ids=["resident", "streamed", "wild"],
)
def test_the_batches_are_those_of_a_cpu(new_trainer, labelled, work_as_on_a_gpu, options, memory):
    """With augmentation in iteration 0, and without it in iteration 1."""
    cpu = new_trainer(options)
    expected = [list(cpu.batches(*labelled, iteration)) for iteration in (0, 1)]
    work_as_on_a_gpu(memory)
    gpu = new_trainer(options)
    for iteration in 0, 1:
        assert [len(images) for images, _ in expected[iteration]] == [3, 3, 4] * 2
        whole, rest = (list(gpu.batches(*labelled, iteration, first)) for first in (0, 4))
        assert len(rest) == 2
        pairs = zip(expected[iteration] + expected[iteration][4:], whole + rest, strict=True)
        for (images, targets), (found_images, found_targets, real) in pairs:
            count = len(images)
            assert found_images.shape == found_targets.shape == (4, 48, 64, 1)
            assert found_images.dtype == found_targets.dtype == real.dtype == tf.float32
            np.testing.assert_allclose(found_images[:count], images, atol=1e-5)
            np.testing.assert_allclose(found_targets[:count], targets, atol=1e-6)
            np.testing.assert_array_equal(real, np.reshape([1.0] * count + [0.0] * (4 - count), (4, 1, 1, 1)))
    assert ("all_images" in vars(gpu)) == (memory == MEMORY)


def test_a_training_set_smaller_than_a_batch_is_one_batch(new_trainer, labelled, work_as_on_a_gpu):
    work_as_on_a_gpu()
    positions, labels = labelled
    batches = list(new_trainer().batches(positions[:3], labels[:3], 1))
    assert [images.shape[0] for images, _, _ in batches] == [3, 3]
    assert all((real.numpy() == 1).all() for *_, real in batches)


@pytest.fixture(scope="module")
def trained_on_a_cpu():
    """The weights before and after a training, for each loss that a test has asked for."""
    return {}


@pytest.mark.parametrize(
    ("loss", "memory", "xla"),
    [("dice", MEMORY, False), ("jaccard_bce", LITTLE, False), ("dice_bce", MEMORY, True)],
    ids=["dice", "jaccard_bce-streamed", "dice_bce-XLA"],
)
def test_a_training_is_that_of_a_cpu(
    new_trainer, labelled, work_as_on_a_gpu, kept_determinism, trained_on_a_cpu, capsys, loss, memory, xla
):
    tf_config.disable_op_determinism()  # XLA has no deterministic gradient of max-pooling
    if loss not in trained_on_a_cpu:
        cpu = new_trainer(f"--loss {loss}")
        before = cpu.model.get_weights()
        cpu.fit(*labelled, 0)
        trained_on_a_cpu[loss] = before, cpu.model.get_weights()
    before, expected = trained_on_a_cpu[loss]
    capsys.readouterr()
    work_as_on_a_gpu(memory, xla)
    gpu = new_trainer(f"--loss {loss}")
    gpu.fit(*labelled, 0)
    for found, value in zip(gpu.model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-4)
    assert min(np.abs(value - old).max() for value, old in zip(expected, before)) > 1e-3
    said = capsys.readouterr()
    assert said.out.count("XLA compiles the training step") == xla
    assert said.err == ""


@pytest.mark.parametrize("options", ["", "--weight-average 0.9 --augmentation wild --artefacts 0.7"])
def test_an_interrupted_training_ends_like_an_undisturbed_one(
    new_trainer, labelled, work_as_on_a_gpu, kept_determinism, monkeypatch, options
):
    tf.config.experimental.enable_op_determinism()
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    work_as_on_a_gpu()
    whole, rest = new_trainer(options, "whole"), new_trainer(options, "interrupted")
    step, steps = rest.step, []

    def save_now_and_then(iteration, number):
        Checkpoint.save_now_and_then(whole.checkpoint, iteration, number)
        if number == 4:  # of 6: here the other one was interrupted
            shutil.copy(whole.checkpoint.path, rest.checkpoint.path)

    whole.checkpoint.save_now_and_then = save_now_and_then
    whole.fit(*labelled, 0)
    rest.step = lambda *batch: steps.append(step(*batch))
    rest.fit(*labelled, 0)
    assert len(steps) == 2
    variables = [[*made.model.variables, *made.model.optimizer.variables] for made in (whole, rest)]
    for value, same in zip(*variables, strict=True):
        np.testing.assert_array_equal(same, value)


def test_float16_training_recovers_from_a_scale_that_is_too_large(new_trainer, labelled, work_as_on_a_gpu):
    """A gradient that is not finite halves the scale and changes no weight."""
    work_as_on_a_gpu()
    trainer = new_trainer("--precision float16 --loss dice_bce --initial-steps 24")
    optimizer, before, scales = trainer.model.optimizer, trainer.model.get_weights(), []
    optimizer.dynamic_scale.assign(2.0**32)
    step = trainer.step

    def watched(*batch):
        step(*batch)
        scales.append(float(optimizer.dynamic_scale))
        same = all(map(np.array_equal, trainer.model.get_weights(), before))
        assert same == (scales[-1] == 2.0 ** (32 - len(scales)))

    trainer.step = watched
    trainer.fit(*labelled, 0)
    assert scales[0] == 2.0**31
    assert scales[-1] == scales[-2] < 2.0**31
    after = trainer.model.get_weights()
    assert all(np.isfinite(values).all() for values in after)
    assert any(np.abs(new - old).max() > 1e-3 for new, old in zip(after, before))


# --------------------------------------------------------------------------------------------------------- the scoring


def with_an_eye_for_the_dark(model):
    """Random weights, but the first map of the finest levels tells how dark a pixel is, so that the network marks the
    discs."""
    with_random_weights(model, gain=3.6)
    skip = -model.get_layer("encoder_0_a").filters
    for name, source, factor in (
        ("encoder_0_a", 0, -1),
        ("encoder_0_b", 0, 1),
        ("decoder_0_a", skip, 1),
        ("decoder_0_b", 0, 1),
        ("probability", 0, 6),
    ):
        layer = model.get_layer(name)
        kernel, bias = (np.array(variable) for variable in (layer.kernel, layer.bias))
        middle = len(kernel) // 2
        kernel[..., 0] *= name == "probability"
        kernel[middle, middle, source, 0], bias[0] = factor, -3 * (name == "probability")
        layer.kernel.assign(kernel)
        layer.bias.assign(bias)
    return model


@pytest.fixture
def scoring(dataset, new_trainer):
    """A function that makes a Trainer whose network marks the discs, and a ceal.Pool of 40 unlabelled images."""

    def new():
        trainer = new_trainer("--passes 3 --filters 3")
        with_an_eye_for_the_dark(trainer.model)
        return trainer

    return new, ceal.Pool(np.arange(4), dataset.masks(np.arange(4)), np.arange(4, 44), np.arange(44, 48))


def test_the_scores_are_those_of_a_cpu_and_a_record_goes_on_either_way(scoring, work_as_on_a_gpu, tmp_path):
    new, pool = scoring
    cpu, record, records = new(), tmp_path / "record", []
    expected, proposals = cpu.score(pool, 1, record), list(cpu.proposals(pool.unlabelled[:3], 1))
    records.append(record.read_text())
    work_as_on_a_gpu()
    gpu = new()
    assert (cpu.batch, cpu.chunk, gpu.batch, gpu.chunk) == (16, 16, 64, 256)
    record.unlink()
    np.testing.assert_allclose(gpu.score(pool, 1, record), expected, rtol=1e-4)
    np.testing.assert_allclose(list(gpu.proposals(pool.unlabelled[:3], 1)), proposals, atol=1e-5)
    records.append(record.read_text())
    assert np.ptp(expected[0]) > 0.01
    assert np.ptp(expected[1]) > 0.01
    for other, begun in zip((gpu, cpu), records):
        record.write_text("".join(begun.splitlines(keepends=True)[:1]))
        np.testing.assert_allclose(other.score(pool, 1, record), expected, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- XLA


def in_python(x):
    return tf.numpy_function(lambda values: values + 1, [x], tf.float32)


def moved(x):
    options = {"output_shape": [4, 4], "fill_value": 0.0, "interpolation": "NEAREST", "fill_mode": "NEAREST"}
    return tf.raw_ops.ImageProjectiveTransformV3(images=x, transforms=[[1.0, 0, 0, 0, 1, 0, 0, 0]], **options) + 1


@pytest.mark.parametrize("function", [in_python, moved])
def test_what_xla_cannot_compile_works_without_it_after_one_warning(function, capsys):
    call, ones = devices.compiled(function, "step", xla=True, reduce_retracing=True), tf.ones((1, 4, 4, 1))
    for _ in range(3):
        np.testing.assert_array_equal(call(ones), 2 * ones)
    np.testing.assert_array_equal(call(tf.ones((2, 4, 4, 1))), tf.fill((2, 4, 4, 1), 2.0))
    error = capsys.readouterr().err
    assert error.count("warning: XLA cannot compile the step (") == error.count("\n") == 1
    assert "unsupported operations" in error
    assert "going on without it" in error


def test_threads_that_begin_together_are_told_once(capsys):
    """The scoring of a pool calls the passes from two threads."""

    def slow_to_trace(function):
        def traced(x):
            time.sleep(0.3)
            return function(x)

        return traced

    for function in in_python, tf.sin:
        call = devices.compiled(slow_to_trace(function), "passes", xla=True)
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(call, tf.zeros((4, 1, 4, 4, 1))))
        np.testing.assert_array_equal(results, np.full((4, 1, 4, 4, 1), float(function is in_python)))
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1
    assert said.out.count("XLA compiles the passes") == 2  # once each


@pytest.mark.parametrize(("kind", "text"), [("ResourceExhausted", "OOM"), ("Internal", "failed: out of memory")])
def test_a_lack_of_memory_is_not_taken_for_a_failure_of_xla(capsys, kind, text):
    calls = []

    def full(x):
        calls.append(x)
        raise getattr(tf.errors, f"{kind}Error")(None, None, text)

    call = devices.compiled(full, "step", xla=True)
    for _ in range(2):
        with pytest.raises(tf.errors.OpError, match=text):
            call(tf.ones(3))
    assert len(calls) == 2  # never without XLA
    assert capsys.readouterr().err == ""


def test_an_error_of_the_function_itself_is_raised(capsys):
    def wrong(x):
        raise ValueError("our mistake")

    with pytest.raises(ValueError, match="our mistake"):
        devices.compiled(wrong, "step", xla=True)(tf.ones(3))
    assert capsys.readouterr().err == ""


def test_without_xla_nothing_is_said(capsys):
    call = devices.compiled(in_python, "step", xla=False)
    np.testing.assert_array_equal(call(tf.ones(3)), [2, 2, 2])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("preset", "pays"), [("demo", (False, False)), ("paper", (True, True)), ("tuned", (True, True))]
)
def test_xla_is_used_in_long_runs(preset, pays):
    assert xla_pays(Config(**PRESETS[preset])) == pays


@pytest.mark.parametrize(("gigabytes", "count"), [(0, 16), (4, 16), (8, 16), (24, 32), (80, 64)])
def test_more_memory_takes_more_images_at_a_time(gigabytes, count):
    assert images_at_a_time(gigabytes * 1e9, 192, 240, 32) == count


def test_a_run_goes_on_elsewhere_with_the_memory_of_the_smaller_gpu(new_trainer, dataset, work_as_on_a_gpu):
    config = new_trainer().config
    assert Trainer(config, dataset, [128.0], [50.0], memory=4e9).memory == 0  # on a CPU
    work_as_on_a_gpu()
    for began, expected in ((4e9, 4e9), (80e9, MEMORY), (None, MEMORY)):
        assert Trainer(config, dataset, [128.0], [50.0], memory=began).memory == expected


# --------------------------------------------------------------------------------------------------------- the devices


# What TensorFlow 2.21 prints where it does not find CUDA.
LOG = """\
2026-11-26 10:00:00.000000: I external/local_xla/xla/tsl/cuda/cudart_stub.cc:31] Could not find cuda drivers on your \
machine, GPU will not be used.
2026-11-26 10:00:00.100000: I tensorflow/core/platform/cpu_feature_guard.cc:210] This TensorFlow binary is optimized \
to use available CPU instructions in performance-critical operations.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with the appropriate \
compiler flags.
2026-11-26 10:00:01.000000: I external/local_xla/xla/tsl/cuda/cudart_stub.cc:31] Could not find cuda drivers on your \
machine, GPU will not be used.
W0000 00:00:1795687201.000000    4242 gpu_device.cc:2342] Cannot dlopen some GPU libraries. Please make sure the \
missing libraries mentioned above are installed properly if you would like to use GPU. Follow the guide at \
https://www.tensorflow.org/install/gpu for how to download and setup the required libraries for your platform.
Skipping registering GPU devices...
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine with these PCI devices, (vendor, class) each, and these GPUs of TensorFlow, whose
    log is LOG or an error. Returns the commands that `why_no_gpu` runs."""

    def make(pci=(("0x10de", "0x030000"),), gpus=(), log=LOG):
        for number, identity in enumerate(pci):
            folder = tmp_path / f"0000:0{number}:00.0"
            folder.mkdir()
            for name, value in zip(("vendor", "class"), identity):
                (folder / name).write_text(f"{value}\n")
        commands = []

        def run(command, **options):
            commands.append((command, options["env"]))
            if isinstance(log, Exception):
                raise log
            return subprocess.CompletedProcess(command, 0, "", log)

        monkeypatch.setattr(devices, "PCI_DEVICES", tmp_path)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: list(gpus))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return commands

    return make


@pytest.mark.parametrize("kind", ["0x030000", "0x030200"])  # with a screen, and without, as in a server
def test_a_gpu_that_tensorflow_cannot_use_is_explained(machine, kind):
    commands = machine([("0x8086", "0x030000"), ("0x10de", kind)])
    said = devices.why_no_gpu()
    ((_, environment),) = commands
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert said.count("Could not find cuda drivers on your machine, GPU will not be used.") == 1
    assert "Cannot dlopen some GPU libraries." in said
    assert "pip install 'tensorflow[and-cuda]'" in said
    assert len(said.splitlines()) == 1
    assert "cudart_stub" not in said
    assert "instructions" not in said
    assert said.count("(") == said.count(")")


def test_a_long_explanation_is_cut_and_keeps_the_remedy(machine):
    machine(log="\n".join(f"E0000 x.cc:{n}] cuda error {n}, which has a long text" for n in range(100)))
    said = devices.why_no_gpu()
    assert len(said) < 900
    assert said.count("(") == said.count(")")
    assert "install NVIDIA's driver" in said


@pytest.mark.parametrize("log", [subprocess.TimeoutExpired("python", 60), OSError("no more processes"), "", "nothing"])
def test_without_a_reason_in_the_log_there_is_still_a_remedy(machine, log):
    machine(log=log)
    said = devices.why_no_gpu()
    assert said.startswith("this machine has an NVIDIA GPU, but TensorFlow cannot use it: install")


@pytest.mark.parametrize(
    "pci",
    [
        [],
        [("0x8086", "0x030000")],
        [("0x10de", "0x040300")],  # the sound of a graphics card
        [("0x1002", "0x030000"), ("0x10de", "0x0c0330")],
        [("0x10de",)],  # without the file `class`
    ],
)
def test_nothing_is_said_where_there_is_no_gpu(machine, pci):
    commands = machine(pci)
    assert devices.why_no_gpu() is None
    assert commands == []


@pytest.mark.parametrize("hidden", ["-1", ""])
def test_nothing_is_said_about_a_gpu_that_is_hidden_on_purpose(machine, monkeypatch, hidden):
    commands = machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.why_no_gpu() is None
    assert commands == []


def test_nothing_is_said_about_a_gpu_that_is_used(machine):
    commands = machine(gpus=["a GPU"])
    assert devices.why_no_gpu() is None
    assert commands == []


BUILT = ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"]


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), BUILT, False),
        ((12, 0), BUILT, False),
        ((8, 6), BUILT, True),
        ((8, 9), BUILT, True),
        ((7, 5), BUILT, True),
        ((7, 5), [], True),
        ((9, 0), ["sm_90a"], True),
        ((5, 2), BUILT, False),
        ((12, 0), ["sm_100", "sm_120"], True),
    ],
)
def test_which_gpus_have_machine_code(capability, built, expected):
    assert devices.has_machine_code(capability, built) == expected


@pytest.fixture
def two_gpus(machine, monkeypatch):
    """Two GPUs. Returns the list of those that TensorFlow sees; None if it has not been told."""
    gpus = [SimpleNamespace(name=f"/physical_device:GPU:{n}") for n in range(2)]
    visible = list(gpus)
    details = {"device_name": "NVIDIA Example", "compute_capability": (9, 0)}
    machine(gpus=gpus)
    monkeypatch.setattr(devices, "gpu_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: list(visible))
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"cuda_compute_capabilities": BUILT})

    def set_visible_devices(chosen, kind):
        assert kind == "GPU"
        visible[:] = chosen if isinstance(chosen, list) else [chosen]

    monkeypatch.setattr(tf.config, "set_visible_devices", set_visible_devices)
    return gpus, visible


@pytest.mark.parametrize(("choice", "used"), [("one", 1), ("all", 2)])
def test_one_of_two_gpus_is_used_unless_both_are_wanted(two_gpus, capsys, choice, used):
    gpus, visible = two_gpus
    devices.use_devices(choice)
    assert visible == gpus[:used]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("found GPU:0, GPU:1")
    assert ("one of these GPUs is used; the others stay free" in lines) == (choice == "one")
    assert "no machine code for this GPU (compute capability 9.0)" in lines[-1]


def test_in_a_notebook_that_has_used_the_gpus_they_stay(two_gpus, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    devices.use_devices()
    assert "stay free" not in capsys.readouterr().out


def test_the_first_gpu_is_recorded(two_gpus):
    about = devices.about_tensorflow()
    assert about["devices"] == ["/physical_device:GPU:0", "/physical_device:GPU:1"]
    assert (about["gpu"], about["gpu_memory"]) == ("NVIDIA Example", 8 * 10**9)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_without_a_gpu_there_is_no_memory_and_no_note():
    assert devices.gpu_memory() == 0
    assert not devices.on_gpu()
    assert devices.why_a_slow_start() is None
    assert "gpu" not in devices.about_tensorflow()
