"""predict.py: masks at the image's own size, the folders that the challenge's scorer takes, bad images among good."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import blobs
from isic_challenge_scoring.segmentation import SegmentationScore
from PIL import Image

import predict
from utils import segmentation_metrics


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
        (["images", "--weights", "images/metadata.csv"], "metadata.csv: these are no weights"),
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
    """Files that are unusual and yet pictures: name -> the size (height, width) that their masks must have."""
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


def test_a_name_that_begins_with_a_dash_follows_two(unet_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd_images(tmp_path, np.full((48, 64), 99, np.uint8))
    run_main(monkeypatch, "--weights", unet_weights, "--out", "out", "--", "-dash.png")
    assert (tmp_path / "out" / "-dash_segmentation.png").exists()
