"""predict.py: masks at the image's own size, in folders that the challenge's scorer reads; bad images among good ones;
the metrics, compared with that scorer; each option, checked by an independent route."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, blobs
from isic_challenge_scoring.segmentation import SegmentationScore
from PIL import Image
from scipy import ndimage
from scipy.stats import binom

import predict
import prediction
from data import draw_row, normalise
from pictures import TURNS
from unet import build_unet, load_unet, save_unet
from utils import read_csv, segmentation_metrics


@pytest.fixture
def lesions(tmp_path):
    """A folder of images of several sizes, with the truth in a folder beside it, as ISIC ships them."""
    images, masks = blobs(20, 240, 320, seed=5)
    for folder in ("images", "truth"):
        (tmp_path / folder).mkdir()
    for n, (image, mask) in enumerate(zip(images[..., 0], masks[..., 0])):
        size = (320 + 16 * n, 240 + 10 * n)
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("RGB")
        picture.resize(size).save(tmp_path / "images" / f"ISIC_{n:07d}.jpg")
        truth = Image.fromarray((mask * 255).astype(np.uint8))
        truth.resize(size, Image.Resampling.NEAREST).save(tmp_path / "truth" / f"ISIC_{n:07d}_segmentation.png")
    Image.new("L", (9, 9)).save(tmp_path / "images" / "ISIC_0000000_superpixels.png")
    (tmp_path / "images" / "metadata.csv").write_text("image_id\n")
    return tmp_path


def test_masks_have_the_images_size_and_the_challenges_scorer_takes_them(run_script, lesions, unet_weights):
    done = run_script("predict.py", "images", "--weights", unet_weights, "--out", "masks", "--uncertainty", "--overlay")
    assert done.returncode == 0, done.stderr
    assert "masks: 20 masks" in done.stdout
    masks = sorted(path for path in (lesions / "masks").iterdir() if path.is_file())
    assert [path.name for path in masks] == [f"ISIC_{n:07d}_segmentation.png" for n in range(20)]
    for n, path in enumerate(masks):
        with Image.open(path) as mask:
            assert (mask.mode, mask.size) == ("L", (320 + 16 * n, 240 + 10 * n))
            assert set(np.unique(mask)) == {0, 255}
    score = SegmentationScore.from_dir(lesions / "truth", lesions / "masks").macro_average
    assert score["dice"] > 0.9

    ours = [
        segmentation_metrics(
            np.asarray(Image.open(lesions / "truth" / path.name))[None] > 127, np.asarray(Image.open(path))[None] > 127
        )
        for path in masks
    ]
    for name in score.index:
        assert np.mean([metrics[name] for metrics in ours]) == pytest.approx(score[name], abs=1e-6)

    for folder, suffix in ("uncertainty", "uncertainty"), ("overlay", "overlay"):
        with Image.open(lesions / "masks" / folder / f"ISIC_0000003_{suffix}.png") as picture:
            assert picture.size == (368, 270)
    with open(lesions / "masks" / "uncertainty" / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"ISIC_{n:07d}" for n in range(20)]
    assert all(float(row["uncertainty"]) > 0 for row in rows)
    assert all(0 < float(row["agreement"]) <= 1 for row in rows)


def test_images_on_which_specialists_may_disagree_are_named(tmp_path, capsys):
    """The Dice that two masks drawn with these probabilities would have is 0.5 for the first, 0.9 for the second."""
    (tmp_path / "uncertainty").mkdir()
    maps = {"unsure": 0.5, "sure": 0.9}
    for name in maps:
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    mean = {name: np.full((16, 16), value, np.float32) for name, value in maps.items()}
    options = prediction.Options(tmp_path, passes=2)
    results = [
        prediction.save_results(tmp_path / f"{name}.png", (32, 32), mean[name], mean[name] * 0.1, mean[name], options)
        for name in maps
    ]
    predict.report_uncertainty(results, tmp_path / "uncertainty")
    said = "specialists are likely to disagree on 1 of 2 images (expected agreement below 0.75): unsure;"
    assert said in capsys.readouterr().out
    with open(tmp_path / "uncertainty" / "scores.csv") as file:
        found = {row["name"]: float(row["agreement"]) for row in csv.DictReader(file)}
    assert found == pytest.approx(maps)


def test_a_bad_image_is_named_and_the_rest_is_done(run_script, lesions, unet_weights):
    (lesions / "images" / "ISIC_0000004.jpg").write_text("no picture")
    good = lesions / "images" / "ISIC_0000019.jpg"
    good.write_bytes(good.read_bytes()[:3000])  # the last one is truncated
    done = run_script("predict.py", "images", "--weights", unet_weights, "--out", "masks")
    assert done.returncode == 2
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 2
    assert "ISIC_0000004.jpg: not a readable picture" in errors[0]
    assert "ISIC_0000019.jpg: not a readable picture" in errors[1]
    assert len(list((lesions / "masks").iterdir())) == 18


def test_the_overlay_outlines_the_mask_only(lesions, unet_weights, monkeypatch, capsys):
    path = lesions / "images" / "ISIC_0000001.jpg"
    run_main(monkeypatch, path, "--weights", unet_weights, "--out", lesions / "out", "--overlay")
    overlay = np.asarray(Image.open(lesions / "out/overlay/ISIC_0000001_overlay.png"))
    mask = np.asarray(Image.open(lesions / "out/ISIC_0000001_segmentation.png")) > 0
    drawn = (overlay == (0, 255, 255)).all(-1)
    edge = np.zeros_like(mask)
    for axis in (0, 1):
        for step in (-1, 1):
            edge |= mask != np.roll(mask, step, axis)
    assert drawn.any()
    assert not (drawn & ~edge).any()


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, arguments)])
    return predict.main()


def test_normalisation_comes_with_the_weights(lesions, unet_weights, monkeypatch):
    """An image of half the contrast needs half the deviation."""
    halved = lesions / "halved.weights.h5"
    halved.write_bytes(unet_weights.read_bytes())
    with h5py.File(halved, "a") as file:
        settings = json.loads(file.attrs["unet"])
        file.attrs["unet"] = json.dumps({**settings, "std": [settings["std"][0] / 2]})
    with Image.open(lesions / "images" / "ISIC_0000000.jpg") as picture:
        grey = np.asarray(picture.convert("L")).astype(float)
    Image.fromarray(((grey - 128) / 2 + 128).round().astype(np.uint8)).save(lesions / "weak.png")
    run_main(monkeypatch, lesions / "images/ISIC_0000000.jpg", "--weights", unet_weights, "--out", lesions / "a")
    run_main(monkeypatch, lesions / "weak.png", "--weights", halved, "--out", lesions / "b")
    first = np.asarray(Image.open(lesions / "a/ISIC_0000000_segmentation.png"))
    second = np.asarray(Image.open(lesions / "b/weak_segmentation.png"))
    assert np.mean(first != second) < 0.01


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jpg"], "nowhere.jpg: there is no such file"),
        (["truth"], "truth: no image in this folder"),
        (["images", "images/ISIC_0000003.jpg"], "would have the same mask"),
        (["images", "--passes", "0", "--uncertainty"], "--passes 0: must be at least 1"),
        (["images", "--passes", "9"], "--passes 9: only --uncertainty uses passes"),
        (["images", "--weights", "images/metadata.csv"], "metadata.csv: not a weights file of train.py"),
        (["images", "--weights", "nowhere.weights.h5"], "nowhere.weights.h5: there is no such weights file"),
    ],
)
def test_a_users_mistake_writes_nothing(lesions, unet_weights, monkeypatch, arguments, said):
    monkeypatch.chdir(lesions)
    with pytest.raises(predict.UserError) as error:
        run_main(monkeypatch, "--weights", unet_weights, "--out", "out", *arguments)
    assert said in str(error.value)
    assert not (lesions / "out").exists()


def odd_images(folder, grey):
    """Save unusual but valid pictures: a dict of name to the size (height, width) that the mask must have."""
    picture, (height, width) = Image.fromarray(grey), grey.shape
    turned = Image.Exif()
    turned[0x0112] = 6
    saves = {
        "cmyk.jpg": lambda path: picture.convert("CMYK").save(path),
        "palette.png": lambda path: picture.convert("P").save(path),
        "transparent.png": lambda path: picture.convert("P").save(path, transparency=b"\x00\x80"),
        "alpha.png": lambda path: picture.convert("RGBA").save(path),
        "bilevel.png": lambda path: picture.convert("1").save(path),
        "turned.jpg": lambda path: picture.save(path, exif=turned),
        "moving.webp": lambda path: picture.convert("RGB").save(path, save_all=True, append_images=[picture] * 2),
        "png_named.jpg": lambda path: picture.save(path, "PNG"),
        "with a space.png": picture.save,
        "-dash.png": picture.save,
        "läsion_病.png": picture.save,
        "two.dots.png": picture.save,
        "link.png": lambda path: path.symlink_to(folder / "with a space.png"),
    }
    for name, save in saves.items():
        save(folder / name)
    return {name: (width, height) if name == "turned.jpg" else (height, width) for name in saves}


@pytest.mark.filterwarnings("error::UserWarning")
def test_odd_but_readable_images_get_their_masks(unet_weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    sizes = odd_images(tmp_path / "in", blobs(1, 70, 90, seed=2)[0][0, ..., 0].clip(0, 255).astype(np.uint8))
    run_main(monkeypatch, tmp_path / "in", "--weights", unet_weights, "--out", tmp_path / "out")
    assert capsys.readouterr().err == ""
    for name, size in sizes.items():
        with Image.open(tmp_path / "out" / f"{Path(name).stem}_segmentation.png") as mask:
            assert mask.size[::-1] == size
            assert set(np.unique(mask)) <= {0, 255}


def test_a_name_that_begins_with_a_dash_is_given_after_two_dashes(unet_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd_images(tmp_path, np.full((48, 64), 99, np.uint8))
    run_main(monkeypatch, "--weights", unet_weights, "--out", "out", "--", "-dash.png")
    assert (tmp_path / "out" / "-dash_segmentation.png").exists()


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("meanwhile", "done"),
    [
        (lambda folder: None, 16),
        (lambda folder: (folder / "out" / "ISIC_0000003_segmentation.png").unlink(), 0),  # its batch is done again
        (lambda folder: os.utime(folder / "images" / "ISIC_0000003.jpg"), 0),  # it is another command's record then
    ],
)
def test_a_stopped_prediction_goes_on_where_it_was(lesions, unet_weights, monkeypatch, capsys, meanwhile, done):
    monkeypatch.chdir(lesions)
    arguments = "images", "--weights", unet_weights, "--out", "out", "--uncertainty", "--passes", 2, "--truth", "truth"
    (lesions / "images" / "ISIC_0000004.jpg").write_text("no picture")
    assert run_main(monkeypatch, *arguments) == 2
    whole = contents(lesions / "out"), capsys.readouterr()
    shutil.rmtree(lesions / "out")
    add = prediction.Record.add

    def stop(record, row):
        if row[0] == "ISIC_0000018":
            raise KeyboardInterrupt
        add(record, row)

    with monkeypatch.context() as patch:
        patch.setattr(prediction.Record, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run_main(monkeypatch, *arguments)
    meanwhile(lesions)
    capsys.readouterr()
    assert run_main(monkeypatch, *arguments) == 2
    told = f"{done} of 20 images were done before\n" if done else ""
    said = capsys.readouterr()
    assert (said.out, said.err) == (whole[1].out, told + whole[1].err)
    left = [path for path in (lesions / "out").glob(".*") if not (path.suffix == ".jsonl" and not done)]
    assert left == []
    assert {name: file for name, file in contents(lesions / "out").items() if name[0] != "."} == whole[0]


def contents(folder):
    """A dict of the name of each file in a folder and below to its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- --truth

METRICS = "dice", "jaccard", "sensitivity", "specificity", "accuracy", "threshold_jaccard"


def of_scorer(truth, masks):
    """The means from the challenge's scorer, as a dict."""
    return SegmentationScore.from_dir(truth, masks).macro_average.to_dict()


def printed_table(text):
    """{metric: (mean, the rest of the line)} of what predict.py printed."""
    lines = [line for line in text.splitlines() if line[:20].strip().replace(" ", "_") in METRICS]
    return {line[:20].strip().replace(" ", "_"): (float(line[20:28]), line[28:].strip()) for line in lines}


def test_the_metrics_are_those_of_the_challenges_scorer(run_script, lesions, unet_weights):
    Image.new("RGB", (300, 200), (190, 190, 190)).save(lesions / "images" / "ISIC_0000002.jpg")  # no lesion
    Image.fromarray(np.pad(np.full((50, 60), 255, np.uint8), ((0, 150), (0, 240)))).save(
        lesions / "truth" / "ISIC_0000002_segmentation.png"
    )
    done = run_script("predict.py", "images", "--weights", unet_weights, "--truth", "truth", "--largest", "--overlay")
    assert done.returncode == 0, done.stderr
    assert not np.any(Image.open(lesions / "masks" / "ISIC_0000002_segmentation.png"))

    rows = read_csv(lesions / "masks" / "metrics.csv")
    assert list(rows[0]) == ["id", *METRICS]
    assert [row["id"] for row in rows] == [f"ISIC_{n:07d}" for n in range(20)]
    assert [float(rows[2][name]) for name in METRICS] == [0, 0, 0, 1, pytest.approx(0.95), 0]
    theirs, table = of_scorer(lesions / "truth", lesions / "masks"), printed_table(done.stdout)
    for name in METRICS:
        values = [float(row[name]) for row in rows]
        assert np.mean(values) == pytest.approx(theirs[name], abs=1e-6)
        mean, (low, high) = table[name][0], map(float, table[name][1].split(" to "))
        assert mean == pytest.approx(theirs[name], abs=1e-4)
        assert min(values) - 1e-4 <= low <= mean <= high <= max(values) + 1e-4


def test_rating_equals_the_challenges_scorer_on_random_and_extreme_masks(tmp_path):
    rng = np.random.default_rng(4)
    noise = [ndimage.gaussian_filter(rng.standard_normal((37, 53)), 3) for _ in range(18)]
    truths = [np.where(values > np.quantile(values, 0.3 + 0.03 * n), 255, 0) for n, values in enumerate(noise)]
    masks = [values + 0.02 * rng.standard_normal(values.shape) > np.median(values) for values in noise]
    masks[0][:], masks[1][:], truths[2][:] = False, True, 255
    truths[3], masks[4] = np.pad([[255]], ((0, 36), (0, 52))), truths[4] > 0  # one pixel; a perfect mask
    edges = rng.choice(np.argwhere((truths[5] > 0) & ~ndimage.binary_erosion(truths[5] > 0, border_value=1)), 15)
    truths[5][tuple(edges.T)] = np.arange(121, 136)  # grey at the edges, on both sides of the scorer's limit
    for n, (truth, mask) in enumerate(zip(truths, masks)):
        for folder, pixels in ("truth", truth), ("mask", mask * 255):
            path = tmp_path / f"{folder}_{n}" / f"ISIC_{n:07d}_segmentation.png"
            path.parent.mkdir()
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        ours = prediction.rate(mask, prediction.read_truth(tmp_path / f"truth_{n}" / path.name, mask.shape))
        assert ours == pytest.approx(of_scorer(tmp_path / f"truth_{n}", path.parent), abs=1e-6), n


def test_what_cannot_be_rated_is_named_and_the_rest_is_rated(lesions, unet_weights, monkeypatch, capsys):
    truth = lesions / "truth"
    (truth / "ISIC_0000000_segmentation.png").rename(truth / "isic_0000000_Segmentation.PNG")
    (truth / "ISIC_0000001_segmentation.png").rename(truth / "ISIC_0000001.png")
    for n in (5, 6):
        (truth / f"ISIC_{n:07d}_segmentation.png").unlink()
    Image.new("L", (319, 240), 255).save(truth / "ISIC_0000007_segmentation.png")
    short = truth / "ISIC_0000008_segmentation.png"
    short.write_bytes(short.read_bytes()[:-300])
    monkeypatch.chdir(lesions)
    assert run_main(monkeypatch, "images", "--weights", unet_weights, "--truth", "truth") == 2
    said = capsys.readouterr()
    assert "masks: 20 masks" in said.out
    assert "2 images (ISIC_0000005, ISIC_0000006)" in said.out
    errors = said.err.splitlines()
    assert len(errors) == 2
    assert "ISIC_0000007_segmentation.png is 240x319 and its image 310x432" in errors[0]
    assert "ISIC_0000008_segmentation.png: not a readable picture" in errors[1]
    rated = {row["id"]: row for row in read_csv("masks/metrics.csv")}
    assert sorted(rated) == [f"ISIC_{n:07d}" for n in range(20) if n not in (5, 6, 7, 8)]
    assert all(float(row["dice"]) > 0.8 for row in rated.values())


def test_a_png_is_not_its_own_true_mask(tmp_path):
    for name in ("a.png", "b.png", "b_segmentation.png"):
        (tmp_path / name).touch()
    images, _ = predict.find_images([tmp_path])
    assert predict.find_truths(tmp_path, images)[0] == {tmp_path / "b.png": tmp_path / "b_segmentation.png"}


def test_a_true_mask_is_found_whichever_way_an_accented_letter_is_written(tmp_path):
    image, mask = tmp_path / "n\u00e9.jpg", tmp_path / "ne\u0301_segmentation.png"
    image.touch(), mask.touch()
    assert predict.find_truths(tmp_path, {image: image.stem})[0] == {image: mask}


def test_ambiguous_true_masks_are_refused(tmp_path):
    for name in ("a.jpg", "A.jpg", "a_segmentation.png"):
        (tmp_path / name).touch()
    with pytest.raises(predict.UserError, match=r"a_segmentation.png fits both .*A.jpg and .*a.jpg"):
        predict.find_truths(tmp_path, predict.find_images([tmp_path])[0])
    (tmp_path / "A.jpg").unlink()
    (tmp_path / "a_Segmentation.png").touch()
    with pytest.raises(predict.UserError, match=r"a_Segmentation.png and .*a_segmentation.png are both"):
        predict.find_truths(tmp_path, predict.find_images([tmp_path])[0])


def test_the_true_masks_are_never_overwritten(lesions, unet_weights, monkeypatch):
    before = {path: path.read_bytes() for path in (lesions / "truth").iterdir()}
    (lesions / "link").symlink_to("truth")
    with pytest.raises(predict.UserError, match="would overwrite the true masks"):
        run_main(
            monkeypatch,
            *(lesions / "images", "--weights", unet_weights, "--truth", lesions / "truth", "--out", lesions / "link"),
        )
    assert {path: path.read_bytes() for path in (lesions / "truth").iterdir()} == before


@pytest.mark.parametrize("out", ["images", "masks"])
def test_a_mask_that_a_person_drew_is_never_overwritten(lesions, unet_weights, monkeypatch, out):
    """Whether it is beside its image or not. The program's own masks are overwritten."""
    (lesions / "masks").mkdir()
    arguments = lesions / "images", "--weights", unet_weights, "--out", lesions / out
    run_main(monkeypatch, *arguments)
    run_main(monkeypatch, *arguments)
    drawn = lesions / out / "ISIC_0000003_segmentation.png"
    shutil.copy(lesions / "truth" / drawn.name, drawn)
    (lesions / out / "ISIC_0000000_segmentation.png").unlink()
    before = drawn.read_bytes()
    with pytest.raises(predict.UserError, match=r"ISIC_0000003_segmentation.png: predict.py did not write it"):
        run_main(monkeypatch, *arguments)
    assert drawn.read_bytes() == before
    assert not (lesions / out / "ISIC_0000000_segmentation.png").exists()


def test_a_single_image_has_no_interval(lesions, unet_weights, monkeypatch, capsys):
    image = lesions / "images" / "ISIC_0000003.jpg"
    run_main(
        monkeypatch, image, "--weights", unet_weights, "--out", lesions / "out", "--truth", lesions / "truth", "--tta"
    )
    table = printed_table(capsys.readouterr().out)
    (row,) = read_csv(lesions / "out" / "metrics.csv")
    assert len(table) == 6
    for name, (mean, interval) in table.items():
        assert mean == pytest.approx(float(row[name]), abs=1e-4)
        assert interval == "no interval for a single image"


def test_intervals_are_the_bootstraps():
    """In a resample of 28 ones and 12 zeros the number of ones is binomial. The mean of any resample is nearly
    normal."""
    rng = np.random.default_rng(0)
    values = np.stack([np.arange(40) < 28, np.ones(40), rng.normal(5, 2, 40)]).astype(float)
    mean, low, high = predict.mean_intervals(values)
    np.testing.assert_allclose(mean, values.mean(1))
    assert (low[0], high[0]) == tuple(binom.ppf([0.025, 0.975], 40, 0.7) / 40)
    assert (low[1], high[1]) == (1, 1)
    half = 1.96 * values[2].std() / np.sqrt(40)
    assert (low[2], high[2]) == pytest.approx((mean[2] - half, mean[2] + half), abs=0.05 * half)


# ------------------------------------------------------------------------------- --tta, --largest, --threshold, weights


class Ramp:
    """A "network" whose probability is the image's grey times a weight that depends on the pixel's position."""

    weights = np.arange(12, dtype=np.float32).reshape(3, 4) / 12

    def predict_on_batch(self, images):
        return images * self.weights[..., None]


@pytest.mark.parametrize("tta", [False, True])
def test_tta_is_the_mean_over_the_mirrored_images(tta):
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 4, 1), np.uint8)
    batch = [(n, image, (3, 4)) for n, image in enumerate(images)]
    settings = {"mean": [0.0], "std": [255.0]}
    rows = list(prediction.predict_batch(Ramp(), settings, batch, prediction.Options(Path("out"), tta=tta)))
    # The mean weight of a pixel and its three mirrored pixels is 5.5 / 12 for every pixel.
    weights = 5.5 / 12 if tta else Ramp.weights
    assert [path for path, *_ in rows] == [0, 1, 2, 3, 4]
    found = np.stack([row[2] for row in rows])
    np.testing.assert_allclose(found, images[..., 0] / 255 * weights, rtol=1e-5)


def test_tta_is_off_by_default_and_leaves_the_uncertainty_alone(lesions, unet_weights, monkeypatch, capsys):
    image = lesions / "images" / "ISIC_0000001.jpg"
    for out, options in ("plain", ()), ("tta", ("--tta", "--largest", "--threshold", "0.9")):
        arguments = image, "--weights", unet_weights, "--out", lesions / out, "--uncertainty", "--passes", 3, *options
        assert run_main(monkeypatch, *arguments) == 0
    for name in "scores.csv", "ISIC_0000001_uncertainty.png":
        first, second = (lesions / out / "uncertainty" / name for out in ("plain", "tta"))
        assert first.read_bytes() == second.read_bytes()
    plain, tta = (np.asarray(Image.open(lesions / out / "ISIC_0000001_segmentation.png")) for out in ("plain", "tta"))
    assert 0 < np.mean(plain != tta) < 0.2


def test_the_largest_part_is_kept_and_its_holes_are_filled():
    picture = """
        ........##
        .#####..#.
        .#...#....
        .#.#.#..##
        .#..##..##
        .####...##
        .......###
    """
    filled = """
        ..........
        .#####....
        .#####....
        .#####....
        .#####....
        .####.....
        ..........
    """
    mask, expected = ([[pixel == "#" for pixel in line] for line in text.split()] for text in (picture, filled))
    np.testing.assert_array_equal(prediction.largest_part(np.array(mask)), expected)
    full, empty = np.ones((4, 5), bool), np.zeros((4, 5), bool)
    np.testing.assert_array_equal(prediction.largest_part(full), full)
    np.testing.assert_array_equal(prediction.largest_part(empty), empty)


def test_the_largest_part_on_random_masks_is_that_of_scipy():
    rng = np.random.default_rng(2)
    for _ in range(20):
        mask = ndimage.gaussian_filter(rng.standard_normal((40, 60)), 2) > 0.01
        parts, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = ndimage.sum_labels(mask, parts, range(1, count + 1))
        expected = ndimage.binary_fill_holes(parts == 1 + np.argmax(sizes))
        np.testing.assert_array_equal(prediction.largest_part(mask), expected)


def test_what_is_above_the_threshold_is_lesion(lesions, unet_weights, monkeypatch, capsys):
    image = lesions / "images" / "ISIC_0000001.jpg"

    def mask_and_text(*options):
        run_main(monkeypatch, image, "--weights", unet_weights, "--out", lesions / "out", *options)
        return np.array(Image.open(lesions / "out/ISIC_0000001_segmentation.png")) > 0, capsys.readouterr().out

    (half, text), (high, text_high) = mask_and_text(), mask_and_text("--threshold", "0.97")
    assert "threshold 0.5\n" in text
    assert "threshold 0.97\n" in text_high
    assert high.sum() < half.sum()
    assert not (high & ~half).any()


def test_the_thresholds_tried_are_rated_as_each_would_be(lesions, unet_weights, monkeypatch, capsys):
    def printed(*options):
        arguments = "--weights", unet_weights, "--truth", lesions / "truth", "--out", lesions / "out", "--largest"
        run_main(monkeypatch, lesions / "images", *arguments, *options)
        return capsys.readouterr().out

    text = printed("--try-thresholds")
    lines = [line.split() for line in text.partition("threshold  Dice\n")[2].splitlines()[:19]]
    tried = {float(threshold): float(dice) for threshold, dice in lines}
    assert len(tried) == 19
    for threshold in 0.1, 0.5, 0.95:
        assert printed_table(printed("--threshold", threshold))["dice"][0] == pytest.approx(tried[threshold], abs=1e-4)
    assert f"--threshold {max(tried, key=tried.get):g};" in text


def test_the_best_shipped_weights_are_used_without_weights(lesions, unet_weights, monkeypatch, capsys):
    best, paper = lesions / "best.weights.h5", lesions / "paper.weights.h5"
    monkeypatch.setattr(predict, "SHIPPED", [best, paper])
    monkeypatch.chdir(lesions)
    with pytest.raises(predict.UserError, match="--weights is needed"):
        run_main(monkeypatch, "images/ISIC_0000001.jpg")
    assert not Path("masks").exists()
    for path in paper, best:
        path.write_bytes(unet_weights.read_bytes())
        assert run_main(monkeypatch, "images/ISIC_0000001.jpg") == 0
        assert f"masks: 1 masks by {path}" in capsys.readouterr().out
    assert Path("masks/ISIC_0000001_segmentation.png").exists()


def test_only_the_best_shipped_weights_have_defaults_of_their_own(lesions, unet_weights, monkeypatch, capsys):
    image, best = lesions / "images" / "ISIC_0000001.jpg", lesions / "best.weights.h5"
    best.write_bytes(unet_weights.read_bytes())
    monkeypatch.setattr(predict, "SHIPPED", [best])

    def mask_and_text(*options):
        assert run_main(monkeypatch, image, "--out", lesions / "out", *options) == 0
        return np.array(Image.open(lesions / "out/ISIC_0000001_segmentation.png")), capsys.readouterr().out

    (mask, text), others = mask_and_text(), ("--weights", unet_weights)
    expected, _ = mask_and_text(*others, "--tta", "--largest")
    np.testing.assert_array_equal(mask, expected)
    assert f"by {best}, threshold 0.5, --tta, --largest\n" in text
    plain, text = mask_and_text("--no-tta", "--no-largest")
    np.testing.assert_array_equal(plain, mask_and_text(*others)[0])
    assert f"by {best}, threshold 0.5\n" in text
    assert (plain != mask).any()


def test_the_weights_folder_is_beside_the_program():
    assert [path.name for path in predict.SHIPPED] == ["best.weights.h5", "paper.weights.h5"]
    assert {path.parent for path in predict.SHIPPED} == {Path(predict.__file__).parent / "weights"}


def test_a_network_of_three_channels_sees_colours(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
    coarse.resize((64, 48), Image.Resampling.BILINEAR).save(tmp_path / "a.png")
    mean, std = [100.0, 120.0, 140.0], [40.0, 50.0, 60.0]
    model = build_unet(48, 64, channels=3, filters=4)
    save_unet(model, tmp_path / "rgb.weights.h5", mean, std)
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(np.float32)
    probability = model.predict((pixels[None] - np.float32(mean)) / np.float32(std), verbose=0)[0, ..., 0]
    threshold = np.median(probability)
    options = "--threshold", threshold, "--uncertainty", "--passes", "2", "--tta", "--largest", "--overlay"
    weights = "--weights", tmp_path / "rgb.weights.h5"
    assert run_main(monkeypatch, tmp_path / "a.png", *weights, "--out", tmp_path / "plain", *options[:2]) == 0
    mask = np.asarray(Image.open(tmp_path / "plain/a_segmentation.png")) > 0
    assert np.mean(mask != (probability > threshold)) < 0.01
    assert run_main(monkeypatch, tmp_path / "a.png", *weights, "--out", tmp_path / "all", *options) == 0
    assert len(list((tmp_path / "all").rglob("*.png"))) == 3


def test_the_shipped_weights_outline_a_lesion():
    """Synthetic lesions, on which they were not trained."""
    assert predict.SHIPPED[0].stat().st_size < 32e6
    model, settings = load_unet(predict.find_weights(None))
    size = [settings[name] for name in ("height", "width", "channels")]
    rows = [draw_row(index, 1, *size) for index in range(12)]
    images, masks = np.stack([row.image for row in rows]), np.stack([row.mask for row in rows])
    inputs = normalise(images, settings["mean"], settings["std"])
    dice = segmentation_metrics(masks, model.predict(inputs, verbose=0)[..., 0] > 0.5)["dice"]
    assert np.median(dice) > 0.8


# ------------------------------------------------------------------------------- files and machines as people have them


def photograph(folder, unet_weights, exif=None, size=(120, 160)):
    """A photograph of a disc in the upper left, stored turned if it has an orientation, and its right mask."""
    y, x = np.indices(size)
    mask = np.hypot(y - size[0] / 3, x - size[1] / 3) < 25
    shown = Image.fromarray(np.where(mask, 60, 190).astype(np.uint8))
    folder.mkdir(exist_ok=True)
    if exif:
        back = {5: 5, 6: 8, 7: 7, 8: 6}.get(exif, exif)
        options = Image.Exif()
        options[0x0112] = exif
        shown.transpose(TURNS[back]).save(folder / "a.jpg", exif=options, quality=95)
    else:
        shown.save(folder / "a.jpg", quality=95)
    return np.uint8(255) * mask, ("--weights", unet_weights, "--out", folder.parent / "out")


@pytest.mark.parametrize(("exif", "size"), [(2, (120, 160)), (3, (120, 160)), (4, (120, 160)), (6, (144, 144))])
@pytest.mark.parametrize("right", [True, False])
def test_a_true_mask_drawn_before_the_turn_is_noticed(unet_weights, tmp_path, monkeypatch, capsys, exif, size, right):
    mask, options = photograph(tmp_path / "in", unet_weights, exif, size)
    back = {6: 8}.get(exif, exif)
    (tmp_path / "truth").mkdir()
    drawn = Image.fromarray(mask)
    (drawn if right else drawn.transpose(TURNS[back])).save(tmp_path / "truth" / "a.png")
    assert run_main(monkeypatch, tmp_path / "in", *options, "--truth", tmp_path / "truth") == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("warning: 1 mask (a) taken as drawn on the picture as displayed")
    if right:
        assert len(err) == 1
    else:
        assert err[1].startswith(f"warning: {tmp_path / 'truth' / 'a.png'}: fits the prediction far better if")
    assert (float(read_csv(tmp_path / "out" / "metrics.csv")[0]["dice"]) > 0.7) == right


def test_inverted_true_masks_are_one_warning(lesions, unet_weights, monkeypatch, capsys):
    for path in (lesions / "truth").iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(255 - pixels).save(path)
    given = lesions / "images", "--weights", unet_weights, "--out", lesions / "out", "--truth", lesions / "truth"
    assert run_main(monkeypatch, *given) == 0
    err = capsys.readouterr().err
    assert err.startswith(
        "warning: 20 of 20 masks cover all four corners of their picture (ISIC_0000000, ISIC_0000001, "
    )
    assert "is the lesion white" in err
    assert err.count("\n") == 1


def test_true_masks_of_other_formats_are_found_and_what_is_not_read_is_named(
    unet_weights, tmp_path, monkeypatch, capsys
):
    mask, options = photograph(tmp_path / "in", unet_weights)
    truth = tmp_path / "truth"
    truth.mkdir()
    for name in "b.jfif", "c.xyz", "d.gif", "e", "f.tif":
        Image.open(tmp_path / "in" / "a.jpg").save(
            tmp_path / "in" / name, {"b": "JPEG", "d": "GIF", "f": "TIFF"}.get(name[0], "PNG")
        )
    for name in "A_Segmentation.BMP", "b.gif", "c.tif", "d_segmentation.ppm", "e.jpg":
        Image.fromarray(mask).save(truth / name)
    (tmp_path / "in" / "x.heic").write_bytes(b"?")
    (tmp_path / "in" / "old").mkdir()
    assert run_main(monkeypatch, tmp_path / "in", *options, "--truth", truth) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "6 masks" in out
    assert "not evaluated (no true mask): 2 images (e, f)" in out
    assert out.splitlines()[-1].startswith("left out: 2 files (x.heic, e.jpg), 1 folder (old); export HEIC")
    assert [row["id"] for row in read_csv(tmp_path / "out" / "metrics.csv")] == ["a", "b", "c", "d"]
    assert min(float(row["dice"]) for row in read_csv(tmp_path / "out" / "metrics.csv")) > 0.7


def test_lossy_true_masks_alone_are_an_error_that_names_them(unet_weights, tmp_path, monkeypatch):
    mask, options = photograph(tmp_path / "in", unet_weights)
    (tmp_path / "truth").mkdir()
    Image.fromarray(mask).save(tmp_path / "truth" / "a.jpg")
    with pytest.raises(
        predict.UserError, match=r"truth: no true mask of any image.*left out: 1 file \(a\.jpg\); lossy"
    ):
        run_main(monkeypatch, tmp_path / "in", *options, "--truth", tmp_path / "truth")


def test_subfolders_are_predicted_on_request(unet_weights, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "in"
    mask, _ = photograph(photos, unet_weights)
    for name in "s/a.jpg", "s/t/a.jpg":
        (photos / name).parent.mkdir()
        shutil.copy(photos / "a.jpg", photos / name)
    (photos / "truth" / "s").mkdir(parents=True)
    for name in "a.png", "s/a_segmentation.png":
        Image.fromarray(mask).save(photos / "truth" / name)
    given = photos, "--weights", unet_weights, "--out", photos / "out", "--truth", photos / "truth", "--overlay"
    assert run_main(monkeypatch, *given) == 0
    assert "left out: 2 folders (s, s)" in capsys.readouterr().out
    for _ in range(2):  # the second time, the results are in a subfolder of the input
        assert run_main(monkeypatch, *given, "--recursive") == 0
        out, err = capsys.readouterr()
        assert (err, "3 masks" in out, "left out" in out) == ("", True, False)
        masks = sorted(path.name for path in (photos / "out").glob("*.png"))
        assert masks == [f"{name}_segmentation.png" for name in ("a", "s__a", "s__t__a")]
        assert [row["id"] for row in read_csv(photos / "out" / "metrics.csv")] == ["a", "s__a"]
        assert (photos / "out" / "overlay" / "s__t__a_overlay.png").exists()
    shutil.copy(photos / "a.jpg", photos / "s__a.jpg")
    with pytest.raises(predict.UserError, match=r"s/a\.jpg and .*s__a\.jpg would have the same mask"):
        run_main(monkeypatch, *given, "--recursive")


def test_results_are_no_images_though_they_lie_among_them(unet_weights, tmp_path, monkeypatch):
    photos = tmp_path / "in"
    photograph(photos, unet_weights)
    given = photos, "--recursive", "--weights", unet_weights, "--out", photos, "--overlay", "--uncertainty"
    for _ in range(2):
        assert run_main(monkeypatch, *given, "--passes", "2") == 0
        assert sorted(path.name for path in (photos / "overlay").iterdir()) == ["a_overlay.png"]


def test_an_image_that_goes_meanwhile_is_named_and_the_others_are_not_lost(unet_weights, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "in"
    photograph(photos, unet_weights)
    for name in "b", "c":
        shutil.copy(photos / "a.jpg", photos / f"{name}.jpg")
    predict_batch = prediction.predict_batch

    def going(*arguments):
        rows = list(predict_batch(*arguments))
        (photos / "b.jpg").unlink()
        return rows

    monkeypatch.setattr(prediction, "predict_batch", going)
    assert run_main(monkeypatch, photos, "--weights", unet_weights, "--out", photos / "out", "--overlay") == 2
    assert "b.jpg: there is no such file" in capsys.readouterr().err
    assert sorted(path.stem[0] for path in (photos / "out").glob("*.png")) == ["a", "c"]


class Idle:
    """A network that finds nothing."""

    def predict_on_batch(self, inputs):
        return np.zeros((len(inputs), 48, 64, 1), np.float32)


@pytest.mark.parametrize(("cores", "side", "most"), [(2, 100, 4), (16, 100, 32), (16, 1000, 3), (64, 2500, 1)])
def test_what_is_under_way_at_once_is_limited_by_cores_and_pixels(tmp_path, monkeypatch, cores, side, most):
    """Room for 3 megapixels; the larger pictures have 6."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(prediction, "PIXELS", 3_000_000)
    under_way, highest, lock = [], [], threading.Lock()

    def counted(function):
        def call(*arguments):
            with lock:
                under_way.append(1)
                highest.append(len(under_way))
            try:
                time.sleep(0.02)
                return function(*arguments)
            finally:
                with lock:
                    under_way.pop()

        return call

    for name in "read", "save_results":
        monkeypatch.setattr(prediction, name, counted(getattr(prediction, name)))
    for n in range(40 if side == 100 else 8):
        Image.new("L", (side, side), 99).save(tmp_path / f"{n}.png")
    images, _ = predict.find_images([tmp_path])
    settings = {"height": 48, "width": 64, "channels": 1, "mean": [0.0], "std": [1.0]}
    results = list(prediction.predict_all(images, Idle(), settings, prediction.Options(tmp_path / "out")))
    assert [result.name for result in results] == list(images.values())
    assert max(highest) <= most
    if side == 100:
        assert max(highest) > most / 4


MEMORY = """
import os, resource, sys
os.sched_getaffinity = lambda _: set(range(16))
sys.path.insert(0, sys.argv.pop(1))
import predict
assert predict.main() == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_large_photographs_take_little_memory_on_a_machine_of_many_cores(unet_weights, tmp_path):
    """16 cores are seen. Each of the pictures would take about 400 MB if all were read and written at once."""
    (tmp_path / "in").mkdir()
    Image.effect_noise((6000, 4000), 60).save(tmp_path / "in" / "0.png", compress_level=1)
    for n in range(1, 12):
        os.link(tmp_path / "in" / "0.png", tmp_path / "in" / f"{n}.png")
    command = [sys.executable, "-c", MEMORY, ROOT, "in", "--weights", unet_weights, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2_500_000  # kB
