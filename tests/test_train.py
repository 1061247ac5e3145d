"""train.py and trainer.py: the whole loop as a user runs it, what it must never do, and the augmentation."""

import dataclasses
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, blobs, write_blobs

import ceal
import report
import sampler
import train
import unet
from batches import augmentation, training_batches
from config import PRESETS, TRAINED, Config, read_config
from data import Dataset, split
from run_folder import METRICS
from sampler import mc_dropout
from trainer import Trainer
from unet import load_unet
from utils import UserError, derived_seed, read_csv, segmentation_metrics

TINY = "--filters 8 --initial 16 --pool 30 --test 10 --initial-epochs 15 --active-epochs 2 --batch-size 4 --passes 3"
QUERIES = "--no-detection 2 --most-uncertain 2 --random 3 --pseudo-start 2 --pseudo-first 4 --pseudo-step 2"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 dark discs at 48x64. The id of an image holds its position: B_0000007 is at 7."""
    path = write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 60, 48, 64)
    with Dataset(path) as dataset:
        yield dataset


@pytest.fixture(scope="module")
def a_run(dataset, tmp_path_factory):
    """A whole tiny run, made by `main`; returns its folder and every (positions, targets, iteration) trained on."""
    trained, run = [], tmp_path_factory.mktemp("runs") / "tiny"
    fit = Trainer.fit

    def spy(self, positions, targets, iteration):
        trained.append((positions, targets, iteration))
        fit(self, positions, targets, iteration)

    arguments = ["train.py", "--data", dataset.path, "--run", run, "--iterations", 3, "--learning-rate", 0.001]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", spy)
        patch.setattr("sys.argv", [str(a) for a in arguments] + TINY.split() + QUERIES.split())
        train.main()
    return run, trained


# --------------------------------------------------------------------------------------------- what a run writes


def test_history_has_a_row_per_iteration(a_run):
    history = read_csv(a_run[0] / "history.csv")
    assert ",".join(history[0]) == (
        "iteration,annotations,pseudo_labels,dice,jaccard,sensitivity,specificity,accuracy,threshold_jaccard,"
        "seconds_scoring,seconds_training"
    )
    assert [row["iteration"] for row in history] == ["0", "1", "2", "3"]
    assert [row["annotations"] for row in history] == ["16", "23", "30", "37"]
    assert [row["pseudo_labels"] for row in history] == ["0", "0", "4", "6"]
    assert float(history[-1]["dice"]) > 0.8


def test_the_last_row_is_what_the_last_weights_reach_on_the_test_images(a_run, dataset):
    run, _ = a_run
    row = read_csv(run / "history.csv")[-1]
    model, settings = load_unet(run / "iteration_03" / "model.weights.h5")
    test = split(dataset, 16, 30, 10).test
    inputs = (dataset.images(test) - settings["mean"][0]) / settings["std"][0]
    prediction = model.predict(inputs.astype(np.float32), verbose=0)[..., 0] > 0.5
    for name, values in segmentation_metrics(dataset.masks(test), prediction).items():
        assert float(row[name]) == pytest.approx(values.mean(), abs=1e-5)


def test_normalisation_is_of_the_images_that_may_be_seen(a_run, dataset):
    _, settings = load_unet(a_run[0] / "iteration_00" / "model.weights.h5")
    parts = split(dataset, 16, 30, 10)
    seen = dataset.images([*parts.initial, *parts.pool]).astype(float)
    assert settings["mean"] == [pytest.approx(seen.mean())]
    assert settings["std"] == [pytest.approx(seen.std())]


def test_a_run_holds_what_another_program_needs(a_run, dataset):
    run, _ = a_run
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "config.json",
        "dice.png",
        "environment.json",
        "history.csv",
        *(f"iteration_0{k}" for k in range(4)),
        "overview.png",
        "quality.csv",
        "report.html",
    ]
    assert sorted(p.name for p in (run / "iteration_00").iterdir()) == [
        "history.csv",
        "model.weights.h5",
        "quality.csv",
        "test.csv",
    ]
    assert sorted(p.name for p in (run / "iteration_02").iterdir()) == [
        "answers.csv",
        "answers.npz",
        "examples.png",
        "history.csv",
        "model.weights.h5",
        "quality.csv",
        "queries.csv",
        "scores.csv",
        "scores.png",
        "test.csv",
    ]
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["passes"], config["dropout"]) == ("paper", 3, 0.5)
    environment = json.loads((run / "environment.json").read_text())
    assert {"tensorflow", "keras", "numpy", "scipy", "git_commit", "devices", "command"} <= environment.keys()


def test_scores_are_of_the_pool_and_shrink_by_the_queries(a_run, dataset):
    run, _ = a_run
    pool = set(dataset.ids[split(dataset, 16, 30, 10).pool])
    for k in (1, 2, 3):
        rows = read_csv(run / f"iteration_0{k}" / "scores.csv")
        assert list(rows[0]) == ["id", "uncertainty", "dice", "agreement"]
        assert {row["id"] for row in rows} == pool
        queries = read_csv(run / f"iteration_0{k}" / "queries.csv")
        groups = [row["group"] for row in queries]
        pseudo = {1: 0, 2: 4, 3: 6}[k]
        assert groups == ["no_detection"] * 2 + ["most_uncertain"] * 2 + ["random"] * 3 + ["pseudo"] * pseudo
        assert len({row["id"] for row in queries}) == len(queries)
        assert {row["id"] for row in queries} <= pool
        pool -= {row["id"] for row in queries if row["group"] != "pseudo"}


def test_a_score_is_the_papers_formula_on_the_last_weights(a_run, dataset):
    import scipy.ndimage

    run, _ = a_run
    model, settings = load_unet(run / "iteration_01" / "model.weights.h5")
    rows = read_csv(run / "iteration_02" / "scores.csv")[:5]
    positions = [int(row["id"][2:]) for row in rows]
    inputs = (dataset.images(positions) - settings["mean"][0]) / settings["std"][0]
    mean, variance = mc_dropout(model, inputs, 3, derived_seed(1, 2, "passes"), keys=positions)
    clear = [n for n in range(5) if np.abs(mean[n] - 0.5).min() > 1e-5]  # rounding cannot move their contour
    assert len(clear) >= 2
    for n in clear:
        row = rows[n]
        distance = scipy.ndimage.distance_transform_edt(mean[n] > 0.5)
        expected = (variance[n] * distance / max(distance.max(), 1)).sum()
        assert float(row["uncertainty"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        dice = segmentation_metrics(dataset.masks(positions)[n : n + 1], mean[n : n + 1] > 0.5)["dice"][0]
        assert float(row["dice"]) == pytest.approx(dice, abs=0.01)


# ------------------------------------------------------------------------------------- labels, and the test images


def test_every_image_is_trained_on_with_its_own_mask(a_run, dataset):
    run, trained = a_run
    parts = split(dataset, 16, 30, 10)
    assert [iteration for *_, iteration in trained] == [0, 1, 2, 3]
    annotated = set(dataset.ids[parts.initial])
    for positions, targets, k in trained:
        queries = read_csv(run / f"iteration_0{k}" / "queries.csv") if k else []
        annotated |= {row["id"] for row in queries if row["group"] != "pseudo"}
        pseudo = [row["id"] for row in queries if row["group"] == "pseudo"]
        ids = dataset.ids[positions].tolist()
        assert sorted(ids) == sorted([*annotated, *pseudo])
        truth = dataset.masks(positions)
        for n, id in enumerate(ids):
            if id in annotated:
                np.testing.assert_array_equal(targets[n], truth[n])


def test_pseudo_labels_are_the_networks_own_soft_maps_of_those_images(a_run, dataset):
    run, trained = a_run
    positions, targets, _ = trained[2]
    model, settings = load_unet(run / "iteration_01" / "model.weights.h5")
    pseudo = {row["id"] for row in read_csv(run / "iteration_02" / "queries.csv") if row["group"] == "pseudo"}
    at = [n for n, position in enumerate(positions) if dataset.ids[position] in pseudo]
    assert len(at) == 4
    inputs = (dataset.images(positions[at]) - settings["mean"][0]) / settings["std"][0]
    labels = np.stack([targets[n] for n in at])
    np.testing.assert_allclose(labels, model.predict(inputs, verbose=0)[..., 0], atol=1e-5)
    assert ((labels > 0.01) & (labels < 0.99)).any()


def test_test_images_are_never_trained_on(a_run, dataset):
    test = set(split(dataset, 16, 30, 10).test)
    for positions, *_ in a_run[1]:
        assert not test & set(positions)


def test_training_does_not_read_the_test_images_at_all(dataset, tmp_path, monkeypatch):
    """If all test images and masks are overwritten, the selections and the weights stay the same."""
    spoiled = tmp_path / "spoiled.h5"
    spoiled.write_bytes(dataset.path.read_bytes())
    with h5py.File(spoiled, "a") as file:
        for position in split(dataset, 16, 30, 10).test:
            file["images"][position], file["masks"][position] = 255, 1
    for name, path in ("a", dataset.path), ("b", spoiled):
        arguments = f"train.py --data {path} --run {tmp_path / name} --iterations 1 {TINY} {QUERIES}"
        monkeypatch.setattr("sys.argv", arguments.split())
        train.main()
    first, second = (tmp_path / name / "iteration_01" for name in "ab")
    assert (first / "queries.csv").read_text() == (second / "queries.csv").read_text()
    with h5py.File(first / "model.weights.h5") as a, h5py.File(second / "model.weights.h5") as b:
        assert a.attrs["unet"] == b.attrs["unet"]
    for a, b in zip(*(load_unet(folder / "model.weights.h5")[0].get_weights() for folder in (first, second))):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_the_plain_sampler_gives_the_same_run(a_run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "_is_build_unet", lambda model: False)
    arguments = f"train.py --data {dataset.path} --run {tmp_path / 'r'} --iterations 1 --learning-rate 0.001"
    monkeypatch.setattr("sys.argv", f"{arguments} {TINY} {QUERIES}".split())
    train.main()
    fast, plain = (read_csv(run / "iteration_01" / "queries.csv") for run in (a_run[0], tmp_path / "r"))
    assert fast == plain
    fast, plain = (read_csv(run / "history.csv")[:2] for run in (a_run[0], tmp_path / "r"))
    for a, b in zip(fast, plain, strict=True):
        assert [float(a[name]) for name in METRICS] == pytest.approx([float(b[name]) for name in METRICS])


def test_uniform_queries_need_no_scores_until_there_are_pseudo_labels(dataset, tmp_path, monkeypatch):
    run = tmp_path / "r"
    arguments = f"train.py --data {dataset.path} --run {run} --iterations 2 {TINY} {QUERIES} --query uniform"
    monkeypatch.setattr("sys.argv", arguments.split())
    train.main()
    assert not (run / "iteration_01" / "scores.csv").exists()
    assert {row["group"] for row in read_csv(run / "iteration_01" / "queries.csv")} == {"random"}
    groups = [row["group"] for row in read_csv(run / "iteration_02" / "queries.csv")]
    assert groups == ["random"] * 7 + ["pseudo"] * 4
    assert len(read_csv(run / "iteration_02" / "scores.csv")) == 30 - 7
    assert read_csv(run / "history.csv")[1]["seconds_scoring"] == "0.0"


def test_the_test_images_metrics_are_written_one_by_one(a_run, dataset):
    run, _ = a_run
    rows, row = read_csv(run / "iteration_03" / "test.csv"), read_csv(run / "history.csv")[-1]
    assert [r["id"] for r in rows] == dataset.ids[split(dataset, 16, 30, 10).test].tolist()
    for name in METRICS:
        assert float(row[name]) == pytest.approx(np.mean([float(r[name]) for r in rows]), abs=2e-6)


def test_settings_can_be_chosen_by_labelled_images_held_out(a_run, dataset, tmp_path, monkeypatch):
    """Then the test images are neither trained on nor evaluated, and nothing else changes."""
    run = tmp_path / "r"
    arguments = f"train.py --data {dataset.path} --run {run} --iterations 0 {TINY} {QUERIES} --validation 6"
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--initial-epochs", "1"])
    trained = []
    monkeypatch.setattr(Trainer, "fit", lambda self, positions, *_: trained.extend(positions))
    train.main()
    measured = {row["id"] for row in read_csv(run / "iteration_00" / "test.csv")}
    initial = set(dataset.ids[split(dataset, 16, 30, 10).initial])
    assert len(measured) == 6
    assert measured < initial
    assert set(dataset.ids[trained]) == initial - measured
    assert len(trained) == 10


@pytest.mark.slow
@pytest.mark.parametrize("pool", [0, 30])
def test_without_queries_the_network_trains_on_with_the_labels_that_it_has(dataset, tmp_path, monkeypatch, pool):
    arguments = f"train.py --data {dataset.path} --run {tmp_path / 'r'} --iterations 2 {TINY} --query none".split()
    monkeypatch.setattr("sys.argv", [*arguments, "--pool", str(pool), "--pseudo-first", "0", "--pseudo-step", "0"])
    train.main()
    history = read_csv(tmp_path / "r" / "history.csv")
    assert [(row["annotations"], row["pseudo_labels"]) for row in history] == [("16", "0")] * 3
    assert len({row["dice"] for row in history}) > 1  # the network changes in each iteration


@pytest.mark.slow
def test_a_pool_that_runs_empty_ends_the_run(dataset, tmp_path, monkeypatch, capsys):
    arguments = f"train.py --data {dataset.path} --run {tmp_path / 'r'} --iterations 9 {TINY} {QUERIES}"
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--random", "14"])
    train.main()
    history = read_csv(tmp_path / "r" / "history.csv")
    assert [row["annotations"] for row in history] == ["16", "34", "46"]
    assert "the pool is empty" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- several devices

TWO_DEVICES = """
import sys
import tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import train
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dice", "dice_bce", "jaccard_bce --weight-average 0.5 --normalisation image"])
def test_two_devices_do_what_one_does(dataset, tmp_path, loss):
    """All numbers of images are odd, so that the shares of the devices differ in size."""
    options = f"{TINY} {QUERIES} --loss {loss} --pool 29 --initial 15 --iterations 1".split()
    options += ["--initial-epochs", "3", "--active-epochs", "1"]
    for devices in "one", "all":
        arguments = ["--data", dataset.path, "--run", tmp_path / devices, "--devices", devices, *options]
        command = [sys.executable, "-c", TWO_DEVICES, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    scores = [read_csv(tmp_path / devices / "iteration_01" / "scores.csv") for devices in ("one", "all")]
    assert [row["id"] for row in scores[0]] == [row["id"] for row in scores[1]]
    for name in "uncertainty", "dice":
        one, all = (np.array([float(row[name]) for row in rows]) for rows in scores)
        np.testing.assert_allclose(all, one, rtol=1e-2, atol=1e-6)
        assert np.ptp(one) > 0
    one, all = (read_csv(tmp_path / devices / "history.csv") for devices in ("one", "all"))
    assert [float(row["dice"]) for row in all] == pytest.approx([float(row["dice"]) for row in one], abs=1e-3)


@pytest.mark.slow
def test_more_devices_than_a_batch_has_images_are_refused(dataset, tmp_path):
    arguments = ["--data", dataset.path, "--run", tmp_path / "r", "--devices", "all", *TINY.split(), *QUERIES.split()]
    command = [sys.executable, "-c", TWO_DEVICES, *map(str, arguments), "--batch-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "--batch-size 1: too few images for 2 devices; give at least 2, or --devices one" in done.stderr
    odd = [*command[:-1], "2", "--initial", "15", "--pool", "29", "--run", str(tmp_path / "odd")]
    done = subprocess.run(odd, capture_output=True, text=True, cwd=ROOT)
    assert "--batch-size 2: 15 images make some batches of 1, too few for 2 devices; give at least 3, or" in done.stderr


# ------------------------------------------------------------------------------------------------------ augmentation


def batches_of(images, targets, batch_size, augment=None):
    def read(number):
        batch = slice(number * batch_size, (number + 1) * batch_size)
        return images[batch], targets[batch]

    return training_batches(read, 0, -(-len(images) // batch_size), augment)


def test_image_and_mask_are_moved_together():
    """An image that equals its mask still equals it after augmentation."""
    _, masks = blobs(32, 48, 64)
    batches = batches_of(masks, masks, 8, augmentation(40, 0.2, seed=1))
    moved, areas = 0, []
    for images, targets in batches:
        images, targets = images.numpy(), targets.numpy()
        assert set(np.unique(targets)) <= {0.0, 1.0}
        np.testing.assert_array_equal(np.round(images), targets)
        moved += sum(not any((target == mask).all() for mask in masks) for target in targets)
        areas += targets.mean((1, 2, 3)).tolist()
    assert moved > 28
    assert np.mean(areas) == pytest.approx(masks.mean(), rel=0.2)


def test_augmentation_reaches_as_far_as_it_says_and_no_further():
    """Measured by the rotation and the shift of a vertical bar in the middle."""
    bar = np.zeros((400, 65, 65, 1), np.float32)
    bar[:, 12:53, 32] = 1

    def centre(rotation, width_shift):
        batches = batches_of(bar, bar, 400, augmentation(rotation, width_shift, seed=2))
        ((images, _),) = [(i.numpy()[..., 0], t) for i, t in batches]
        y, x = np.mgrid[:65, :65]
        weight = images / images.sum((1, 2), keepdims=True)
        mean_x, mean_y = (weight * x).sum((1, 2)), (weight * y).sum((1, 2))
        covariance = (weight * (x - mean_x[:, None, None]) * (y - mean_y[:, None, None])).sum((1, 2))
        spread = (weight * (y - mean_y[:, None, None]) ** 2).sum((1, 2))
        return mean_x - 32, np.degrees(np.arctan(covariance / spread))

    shift, _ = centre(0, 0.2)
    assert 12 < np.abs(shift).max() <= 13.1
    shift, angle = centre(40, 0)
    assert np.abs(shift).max() < 0.6
    assert 35 < np.abs(angle).max() <= 40.5
    assert (angle > 5).any()
    assert (angle < -5).any()


def test_half_of_the_images_are_mirrored():
    images = np.zeros((400, 16, 16, 1), np.float32)
    images[:, 4:12, 2:5] = 1
    ((moved, _),) = batches_of(images, images, 400, augmentation(0, 0, seed=3))
    mirrored = (moved.numpy()[:, ::1, ::-1] == images).all((1, 2, 3))
    assert 150 < mirrored.sum() < 250
    assert ((moved.numpy() == images).all((1, 2, 3)) | mirrored).all()


def test_strong_augmentation_moves_image_and_mask_together_and_changes_colours_alone():
    _, masks = blobs(16, 48, 64)
    colours = np.concatenate([masks, 2 * masks, 3 * masks], -1).astype(np.float32)
    ((images, targets),) = batches_of(colours, masks, 16, augmentation(180, 0.1, seed=1, kind="strong"))
    for image, target in zip(images.numpy(), targets.numpy()[..., 0]):
        assert set(np.unique(target)) <= {0.0, 1.0}
        inside, outside = (image[target == value].mean(0) for value in (1, 0))
        contrast = (inside - outside) / [1, 2, 3]
        np.testing.assert_allclose(contrast, contrast[0], rtol=0.1)  # some pixels of interpolated edges lie outside
        assert 0.7 < contrast[0] < 1.25
    assert not np.allclose(images[0, 0, 0], images[1, 0, 0])


def test_far_augmentation_makes_lesions_smaller():
    _, masks = blobs(64, 48, 64)
    ((_, targets),) = batches_of(masks.astype("f4"), masks, 64, augmentation(180, 0.1, seed=1, kind="far"))
    areas = targets.numpy().mean((1, 2, 3)) / masks.mean((1, 2, 3))
    assert 0.2 < areas.min() < 0.35
    assert 0.4 < np.median(areas) < 0.7
    assert areas.max() < 1.5


def test_wild_augmentation_moves_image_and_mask_together_and_changes_light_and_colours():
    _, masks = blobs(64, 48, 64)
    colours = 10 * np.repeat(masks, 3, -1).astype(np.float32)
    ((images, targets),) = batches_of(colours, masks, 64, augmentation(180, 0.1, seed=1, kind="wild"))
    contrasts, areas = [], targets.numpy().mean((1, 2, 3)) / masks.mean((1, 2, 3))
    for image, target in zip(images.numpy(), targets.numpy()[..., 0]):
        assert set(np.unique(target)) <= {0.0, 1.0}
        inside, outside = (np.median(image[target == value], 0) for value in (1, 0))
        assert ((image.mean(-1) > np.mean([inside, outside])) == target).mean() > 0.98
        contrasts.append((inside - outside).mean() / 10)
    assert 0.55 < min(contrasts) < 0.75
    assert 1.3 < max(contrasts) < 1.55
    assert areas.min() < 0.6 < 1.6 < areas.max()
    light = images.numpy()[:, :, :, 0] - images.numpy()[:, :, :, 1]
    assert np.abs(np.median(light, (1, 2))).max() > 0.3  # the colour of the light


def test_artefacts_are_drawn_while_training_is_augmented(trainer):
    positions, labels = np.arange(12), list(trainer.dataset.masks(np.arange(12)))
    trainer.config.rotation = trainer.config.width_shift = 0.0

    def batches(iteration, first=0):
        return [images.numpy() for images, _ in trainer.batches(positions, labels, iteration, first)]

    def same(ones, others):
        return np.mean([(a == b).all() for one, other in zip(ones, others) for a, b in zip(one, other)])

    plain, plain_later = batches(0), batches(1)
    trainer.config.artefacts = 1.0
    drawn = batches(0)
    assert same(plain, drawn) < 0.3
    assert same(plain_later, batches(1)) == 1  # not augmented
    assert same(drawn[2:], batches(0, first=2)) == 1  # after an interruption
    assert same(drawn[:3], drawn[3:]) < 0.3  # other ones in each epoch


def test_the_weights_are_averaged_at_the_end(dataset, tmp_path):
    options = f"--data {dataset.path} --run {tmp_path} --filters 2 --batch-size 4 --learning-rate 1e-2"
    trainer = Trainer(
        read_config(f"{options} --initial-steps 4 --weight-average 0.75".split()), dataset, [128.0], [50.0]
    )
    step, seen = trainer.step, []

    def watched(*batch):
        step(*batch)
        seen.append(trainer.model.get_weights())

    trainer.step = watched
    trainer.fit(np.arange(8), list(dataset.masks(np.arange(8))), 0)
    shares = 0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25
    for found, *values in zip(trainer.model.get_weights(), *seen, strict=True):
        expected = sum(share * value for share, value in zip(shares, values))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found - values[-1]).max() > 1e-3


def test_without_augmentation_soft_targets_stay_as_they_are():
    targets = np.random.default_rng(0).random((10, 16, 16, 1)).astype(np.float32)
    seen = []
    for inputs, outputs in batches_of(targets * 2, targets, 4):
        np.testing.assert_array_equal(inputs, outputs * 2)
        seen += [*outputs.numpy()[:, 0, 0, 0]]
    assert seen == targets[:, 0, 0, 0].tolist()


def test_with_augmentation_pseudo_labels_stay_soft_and_masks_two_valued():
    _, masks = blobs(8, 48, 64)
    targets = np.where(np.arange(8)[:, None, None, None] % 2, masks, 0.2 + 0.5 * masks).astype(np.float32)
    ((images, seen),) = batches_of(targets, targets, 8, augmentation(20, 0.1, seed=1))
    np.testing.assert_array_equal(seen[::2], images[::2])
    np.testing.assert_array_equal(seen[1::2], np.round(images[1::2]))


@pytest.fixture
def trainer(dataset):
    options = f"--data {dataset.path} --filters 2 --batch-size 4 --initial-epochs 2 --active-epochs 2"
    return Trainer(read_config(options.split()), dataset, [128.0], [50.0])


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(trainer):
    """17 images in batches of at most 4: the batch sizes differ by at most one."""
    positions, labels = np.arange(20, 37), [np.full((48, 64), n / 100) for n in range(20, 37)]
    sizes, epochs = [], [[], []]
    for number, (images, targets) in enumerate(trainer.batches(positions, labels, 1)):
        seen = [round(100 * float(target[0, 0, 0])) for target in targets]
        np.testing.assert_allclose(images, trainer.images(seen))
        sizes.append(len(seen))
        epochs[number // 5] += seen
    assert sizes == [3, 3, 4, 3, 4] * 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == positions.tolist()
    assert epochs[0] != epochs[1]


def test_steps_take_the_place_of_epochs_where_they_are_given(trainer):
    positions, labels = np.arange(10), list(trainer.dataset.masks(np.arange(10)))
    assert [len(list(trainer.batches(positions, labels, k))) for k in (0, 1)] == [6, 6]  # two epochs of 4, 3, 3
    trainer.config.initial_steps, trainer.config.active_steps = 7, 5
    assert [len(list(trainer.batches(positions, labels, k))) for k in (0, 1)] == [7, 5]


@pytest.mark.parametrize(
    ("augment", "iteration", "same"),
    [
        ("initial", 0, False),
        ("initial", 1, True),
        ("all", 0, False),
        ("all", 1, False),
        ("none", 0, True),
        ("none", 1, True),
    ],
)
def test_the_option_says_which_trainings_are_augmented(trainer, augment, iteration, same):
    trainer.config.augment = augment
    positions, labels = np.arange(3), list(trainer.dataset.masks(np.arange(3)))
    images, _ = next(iter(trainer.batches(positions, labels, iteration)))
    plain = trainer.images(positions)
    assert all(any((image == other).all() for other in plain) for image in images.numpy()) == same


@pytest.mark.parametrize(("iteration", "active", "highest"), [(0, 1e-6, 1e-5), (1, 1e-6, 1e-6), (1, 0.0, 1e-5)])
def test_the_learning_rate_follows_the_schedule(trainer, monkeypatch, iteration, active, highest):
    trainer.config.schedule, trainer.config.active_learning_rate, rates = "cosine", active, []
    monkeypatch.setattr(trainer, "step", lambda *_: rates.append(float(trainer.model.optimizer.learning_rate)))
    trainer.config.initial_steps = trainer.config.active_steps = 100
    trainer.fit(np.arange(8), list(trainer.dataset.masks(np.arange(8))), iteration)
    assert max(rates) == pytest.approx(highest, rel=0.02)
    assert rates[0] < highest / 10
    assert rates[-1] < highest / 1000


def test_a_scoring_goes_on_with_chunks_of_another_size(trainer, tmp_path):
    """As after an interruption on a machine with more devices."""
    pool = ceal.Pool(np.arange(4), trainer.dataset.masks(np.arange(4)), np.arange(4, 40), np.arange(40, 60))
    expected, record = trainer.score(pool, 1), tmp_path / "record"
    trainer.chunk = 8
    trainer.score(pool, 1, record)
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))
    trainer.chunk = 12
    for found, whole in zip(trainer.score(pool, 1, record), expected):
        np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_training_goes_on_with_the_optimizers_state_or_not_at_all(trainer, tmp_path):
    plain, path = unet.build_unet(48, 64, filters=2), tmp_path / "plain.weights.h5"
    unet.save_unet(plain, path, [128.0], [50.0])
    with pytest.raises(UserError, match=r"not as train.py wrote it .*move this iteration"):
        trainer.load(path)


def test_float16_training_scales_its_loss_and_goes_on_where_it_was(dataset, tmp_path):
    options = f"--data {dataset.path} --filters 2 --batch-size 4 --initial-epochs 4 --precision float16"
    one, other = (Trainer(read_config(options.split()), dataset, [128.0], [50.0]) for _ in range(2))
    positions, path = np.arange(8), tmp_path / "a.weights.h5"
    one.fit(positions, list(dataset.masks(positions)), 0)
    assert not np.array_equal(one.model.get_weights()[0], other.model.get_weights()[0])
    unet.save_unet(one.model, path, [128.0], [50.0])
    other.load(path)
    for values, same in zip(one.model.optimizer.variables, other.model.optimizer.variables):
        np.testing.assert_array_equal(values, same)
    assert float(one.model.optimizer.dynamic_scale) > 1


def test_without_queries_there_are_no_examples(trainer):
    groups = {"random": np.array([], int), "pseudo": np.array([], int)}
    assert report.find_examples(trainer, np.arange(5), np.zeros(5), np.zeros(5), groups, 1) == []


def test_batches_are_the_same_wherever_training_goes_on(trainer):
    positions, labels = np.arange(10), list(trainer.dataset.masks(np.arange(10)))
    whole, rest = (list(trainer.batches(positions, labels, 0, first)) for first in (0, 4))
    assert (len(whole), len(rest)) == (6, 2)
    for (images, targets), (same_images, same_targets) in zip(whole[4:], rest):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(targets, same_targets)


# ------------------------------------------------------------------------------------------------- the command line


def test_the_defaults_are_the_papers():
    config = read_config([])
    expected = {"initial": 600, "pool": 1000, "test": 400, "filters": 32, "dropout": 0.5, "learning_rate": 1e-5}
    expected |= {"batch_size": 32, "initial_epochs": 10, "active_epochs": 2, "iterations": 9, "passes": 20}
    expected |= {"no_detection": 10, "most_uncertain": 10, "random": 15, "rotation": 40, "width_shift": 0.2}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.training_steps(600, 0) == 6000  # docs/method.md, "The initial training"
    assert config.run.startswith("runs/paper-")


@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_epochs_that_are_given_win_over_the_steps_of_the_preset(preset):
    config = read_config(["--preset", preset, "--initial-epochs", "3", "--active-epochs", "2", "--batch-size", "32"])
    assert (config.training_steps(600, 0), config.training_steps(600, 1)) == (3 * 19, 2 * 19)
    config = read_config(["--preset", preset, "--initial-epochs", "3", "--initial-steps", "7"])
    assert config.training_steps(600, 0) == 7


def test_the_number_of_steps_of_the_paper_is_in_no_other_preset():
    assert read_config(["--preset", "demo"]).training_steps(60, 0) == 30 * 15
    assert read_config(["--initial-steps", "0"]).training_steps(600, 0) == 10 * 19


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_run(preset):
    config = read_config(["--preset", preset])
    assert config.preset == preset
    assert config.initial + config.pool in (220, 1600)


def test_tuned_is_the_papers_network_and_loop_and_quick_is_its_training_but_for_rates_and_steps():
    paper, tuned, quick = (dataclasses.asdict(read_config(["--preset", p])) for p in ("paper", "tuned", "quick"))
    training = {*TRAINED, "preset", "run"}
    assert {name for name in paper if paper[name] != tuned[name]} <= training
    differs = {name for name in tuned if tuned[name] != quick[name]}
    assert differs == {
        *("preset", "run", "data", "filters", "passes"),
        *("learning_rate", "active_learning_rate", "initial_steps", "active_steps"),
    }


def test_an_option_overrides_the_preset():
    config = read_config(["--preset", "quick", "--passes", "7"])
    assert (config.passes, config.filters, config.learning_rate) == (7, 16, PRESETS["quick"]["learning_rate"])


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        read_config(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in text for name in vars(Config()))


@pytest.mark.parametrize(
    "wrong",
    [
        "--passes 0",
        "--dropout 0",
        "--dropout 1",
        "--dropout nan",
        "--learning-rate 0",
        "--learning-rate -1",
        "--learning-rate inf",
        "--batch-size 0",
        "--iterations -1",
        "--width-shift 2",
        "--seed -1",
        "--no-detection 0 --most-uncertain 0 --random 0",
        "--no-detection-rule empty --distance none",
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=wrong.split()[0]):
        read_config(wrong.split())


def test_without_data_it_says_how_to_get_it(run_script, tmp_path):
    done = run_script("train.py")
    assert done.returncode == 2
    assert "datasets/isic2017.h5 does not exist" in done.stderr
    assert "python data.py isic" in done.stderr
    assert "--preset demo" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_write_nothing(run_script, dataset, tmp_path):
    done = run_script("train.py", "--data", dataset.path, "--run", "r")
    assert done.returncode == 2
    assert "60 training images, too few" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_touched(run_script, dataset, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "history.csv").write_text("precious")
    done = run_script("train.py", "--data", dataset.path, "--run", "r")
    assert done.returncode == 2
    assert "r exists already and is not a run" in done.stderr
    assert (tmp_path / "r" / "history.csv").read_text() == "precious"


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it_smaller(run_script, tmp_path):
    options = "--initial 16 --pool 20 --test 8 --initial-epochs 1 --active-epochs 1 --iterations 1 --passes 2"
    done = run_script("train.py", "--preset", "demo", "--run", "runs/demo", *options.split())
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "font cache" not in line] == []
    lines = done.stdout.splitlines()
    assert "found CPU:0" in lines[0]
    assert any(line.startswith("iteration 1: 30 annotations,   0 pseudo-labels, Dice ") for line in lines)
    assert "python predict.py" in lines[-2]
    assert "runs/demo/overview.png" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    weights = "runs/demo/iteration_01/model.weights.h5"
    assert weights in lines[-2]
    sheet = run_script("data.py", "show", "runs/demo/synthetic.h5", "sheet.png")
    assert sheet.returncode == 0, sheet.stderr
    done = run_script("predict.py", "sheet.png", "--weights", weights, "--out", "masks")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "masks" / "sheet_segmentation.png").exists()
