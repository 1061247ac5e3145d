"""data.py: ISIC folders to HDF5, bad files of every kind, the split, the statistics, synthetic lesions."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import write_blobs
from PIL import Image

import data
import figures
import synthetic
from pictures import open_mask, read_image, read_mask
from synthetic import draw_artefacts, draw_lesion
from utils import UserError, run_command

SIZE = ("--height", 32, "--width", 48)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `data.py ARGUMENTS...` in this process: (exit code, stdout, stderr). Any other exception is a failure."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_command(data.main)
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def isic(tmp_path):
    """A folder of three good pairs."""
    for n in (1, 2, 3):
        save_pair(tmp_path / "isic", f"ISIC_{n:07d}")
    return tmp_path / "isic"


def folders(source, part="Training"):
    """The folders of a part's images and masks."""
    return source / f"ISIC-2017_{part}_Data", source / f"ISIC-2017_{part}_Part1_GroundTruth"


def save_pair(source, id, rows=16, color=(150, 100, 80), part="Training", suffixes=(".jpg", "_segmentation.png")):
    """Save a plain 64x96 picture, and a mask of its upper `rows` rows."""
    for folder in folders(source, part):
        folder.mkdir(parents=True, exist_ok=True)
    image, mask = (folder / f"{id}{suffix}" for folder, suffix in zip(folders(source, part), suffixes))
    save(image, np.full((64, 96, 3), color), quality=95)
    save(mask, 255 * (np.indices((64, 96))[0] < rows))


def save(path, pixels, **options):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def read(path):
    """Everything in an HDF5 file of data.py, without data.py."""
    with h5py.File(path) as file:
        text = {name: file[name].asstr()[:].tolist() for name in ("ids", "part", "files")}
        arrays = {name: file[name][:] for name in ("images", "masks", "original_sizes", "has_mask")}
        return {**text, **arrays, "chunks": file["images"].chunks, "attributes": dict(file.attrs)}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def assert_refused(result, *names):
    """Assert exit code 2, and one line on stderr that contains these names."""
    code, _, err = result
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: ")
    for name in names:
        assert Path(name).name in err


def assert_nothing_written(folder):
    assert [path for path in folder.rglob("*") if path.name.startswith(".partial") or path.suffix == ".h5"] == []


# ------------------------------------------------------------------------------------------------- folders to a file


@pytest.mark.parametrize("channels", [1, 3])
def test_isic_writes_each_image_with_its_own_mask(run, tmp_path, channels):
    # By name ISIC_1.jpg precedes ISIC_10.jpg, and ISIC_10_segmentation.png precedes ISIC_1_segmentation.png.
    rows = {"ISIC_1": 8, "ISIC_10": 24, "ISIC_2": 16, "ISIC_0000003": 32}
    color = {"ISIC_1": (200, 120, 90), "ISIC_10": (90, 160, 70), "ISIC_2": (60, 80, 150), "ISIC_0000003": (30, 30, 30)}
    suffixes = [(".jpg", "_segmentation.png"), (".JPG", "_Segmentation.png"), (".jpeg", "_Segmentation.PNG")]
    for n, id in enumerate(rows):
        save_pair(tmp_path, id, rows[id], color[id], suffixes=suffixes[n % 3])
    for name in ("ISIC_1_superpixels.png", "ISIC_1.csv", "ISIC_1.txt", "ISIC_77.jpg.txt", "._ISIC_1.jpg"):
        for folder in folders(tmp_path):
            (folder / name).write_text("passed over")

    code, out, err = run("isic", tmp_path, tmp_path / "new" / "x.h5", *SIZE, "--channels", channels)
    assert (code, err) == (0, "")
    assert "4 images" in out
    file = read(tmp_path / "new" / "x.h5")
    assert sorted(file["ids"]) == sorted(rows)
    assert file["part"] == ["train"] * 4
    assert file["images"].dtype == file["masks"].dtype == np.uint8
    assert (file["images"].shape, file["masks"].shape) == ((4, 32, 48, channels), (4, 32, 48))
    assert file["chunks"] == (1, 32, 48, channels)
    assert file["original_sizes"].tolist() == [[64, 96]] * 4
    expected = {"source": "ISIC 2017", "height": 32, "width": 48, "channels": channels, "layout_version": 2}
    assert file["attributes"] == {**expected, "folder": str(tmp_path)}
    assert file["has_mask"].tolist() == [True] * 4
    assert [Path(name).stem for name in file["files"]] == file["ids"]
    assert all((tmp_path / name).is_file() for name in file["files"])
    for id, image, mask in zip(file["ids"], file["images"], file["masks"]):
        np.testing.assert_array_equal(mask, np.indices((32, 48))[0] < rows[id] / 2)
        level = color[id] if channels == 3 else np.dot(color[id], (0.299, 0.587, 0.114))
        assert np.abs(image - np.asarray(level)).max() <= 2, id


@pytest.mark.parametrize("nested", ["{}.zip", "{}", "all in one"])
def test_folders_may_be_nested_and_become_parts(run, tmp_path, nested):
    for n, part in enumerate(["Test_v2", "Validation", "Validation", "Training", "Training", "Training"]):
        save_pair(tmp_path / "flat", f"ISIC_{n}", part=part)
    for folder in (tmp_path / "flat").iterdir():
        (tmp_path / "isic" / nested.format(folder.name)).mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, tmp_path / "isic" / nested.format(folder.name) / folder.name)
    assert run("isic", tmp_path / "isic", tmp_path / "x.h5", *SIZE)[0] == 0
    file = read(tmp_path / "x.h5")
    assert file["part"] == ["train"] * 3 + ["validation"] * 2 + ["test"]
    assert file["ids"] == [f"ISIC_{n}" for n in (3, 4, 5, 1, 2, 0)]


def test_python_data_py_writes_a_file_and_tells_what_is_in_it_or_what_is_wrong(run, run_script, tmp_path):
    for part, rows in {"Training": 8, "Validation": 16, "Test_v2": 32}.items():
        save_pair(tmp_path / "isic", f"ISIC_{rows:07d}", rows, part=part)
    done = run_script("data.py", "isic", "isic", "datasets/x.h5", *SIZE)
    assert (done.returncode, done.stderr) == (0, "")
    code, out, _ = run("info", tmp_path / "datasets" / "x.h5")
    assert code == 0
    for fact in ("3 of 32x48, 1 channel(s)", "train 1", "validation 1", "test 1", "64x96 to 64x96"):
        assert fact in " ".join(out.split())
    assert "median 25.0%, from 12.5% to 50.0%" in out  # 8, 16 and 32 rows of 64
    assert "ISIC_0000008 to ISIC_0000032" in out
    truncate(tmp_path / "isic" / "ISIC-2017_Training_Data" / "ISIC_0000008.jpg")
    done = run_script("data.py", "isic", "isic", "y.h5", *SIZE)
    assert_refused((done.returncode, done.stdout, done.stderr), "ISIC_0000008.jpg")


# ------------------------------------------------------------------------------------------------ any folder to a file


NAMES = ["naevus one.JPG", "übung.png", "-dash.bmp", "a.b.tiff", "0007.webp", "x.jpeg"]


@pytest.fixture
def photos(tmp_path):
    """A folder of six plain images of different greys, and of other files; a folder of the masks of three."""
    images, masks = tmp_path / "photos", tmp_path / "drawn"
    images.mkdir()
    masks.mkdir()
    for n, name in enumerate(NAMES):
        save(images / name, np.full((64, 96, 3), 40 * n))
    for name in ("notes.txt", "x_superpixels.png", "x_segmentation.png", "._x.jpg", "photos.csv"):
        (images / name).write_text("passed over")
    for rows, name in (8, "naevus one_Segmentation.PNG"), (16, "-dash.png"), (24, "übung_segmentation.png"):
        save(masks / name, 255 * (np.indices((64, 96))[0] < rows))
    (masks / "notes.txt").write_text("passed over")
    return images, masks


def test_a_folder_becomes_a_file_in_which_each_image_has_its_mask_or_none(run, photos, tmp_path):
    images, masks = photos
    code, out, err = run("folder", images, tmp_path / "x.h5", "--masks", masks, *SIZE)
    assert (code, err) == (0, "")
    assert "6 images, 3 with a mask" in out
    assert "--oracle folder" in out
    file = read(tmp_path / "x.h5")
    assert sorted(file["ids"]) == sorted(Path(name).stem for name in NAMES)
    assert set(file["part"]) == {"train"}
    assert file["attributes"]["folder"] == str(images)
    rows = {"naevus one": 8, "-dash": 16, "übung": 24}
    for id, name, image, mask, has_mask in zip(*(file[k] for k in ("ids", "files", "images", "masks", "has_mask"))):
        assert np.abs(image - 40.0 * NAMES.index(name)).max() <= 2
        assert Path(name).stem == id
        assert has_mask == (id in rows)
        np.testing.assert_array_equal(mask, np.indices((32, 48))[0] < rows.get(id, 0) / 2)


def test_a_folder_without_any_masks_and_one_with_masks_beside_the_images(run, photos, tmp_path):
    images, masks = photos
    code, out, _ = run("folder", images, tmp_path / "none.h5", *SIZE, "--channels", 3)
    assert (code, read(tmp_path / "none.h5")["has_mask"].sum()) == (0, 0)
    assert "6 images, 0 with a mask" in out
    code, out, _ = run("info", tmp_path / "none.h5")
    assert (code, "with a mask 0" in " ".join(out.split()), "lesion area" in out) == (0, True, False)
    assert run("show", tmp_path / "none.h5", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        red, green, blue = np.moveaxis(np.array(sheet.convert("RGB")), -1, 0)
    assert not np.sum((red < 80) & (green > 180) & (blue > 180))  # no outline

    (images / "x_segmentation.png").unlink()
    shutil.copy(masks / "übung_segmentation.png", images)  # there übung.png is the image, not a second mask
    code, out, err = run("folder", images, tmp_path / "beside.h5", "--masks", images, *SIZE)
    assert (code, err) == (0, "")
    assert "6 images, 1 with a mask" in out
    code, out, _ = run("info", tmp_path / "beside.h5")
    assert "with a mask 1" in " ".join(out.split())
    assert "median 37.5%" in out  # 24 of 64 rows


BAD_FOLDERS = {  # a function that damages the folders, and the names in the message
    "mask without image": (lambda images, masks: save(masks / "other.png", np.full((64, 96), 255)), ["other.png"]),
    "two images": (lambda images, masks: save(images / "x.png", np.zeros((64, 96))), ["x.jpeg", "x.png"]),
    "two masks": (
        lambda images, masks: save(masks / "übung.png", np.full((64, 96), 255)),
        ["übung.png", "übung_segmentation.png"],
    ),
    "text named as an image": (lambda images, masks: (images / "x.jpeg").write_text(HTML), ["x.jpeg"]),
    "text named as a mask": (lambda images, masks: (masks / "-dash.png").write_text(HTML), ["-dash.png"]),
    "an empty mask": (lambda images, masks: save(masks / "-dash.png", np.zeros((64, 96))), ["-dash.png"]),
    "a mask of another aspect": (
        lambda images, masks: save(masks / "-dash.png", np.full((64, 90), 255)),
        ["-dash.png"],
    ),
    "no masks folder": (lambda images, masks: shutil.rmtree(masks), ["drawn"]),
    "no images": (lambda images, masks: [path.unlink() for path in images.iterdir()], ["photos"]),
    "no folder": (lambda images, masks: shutil.rmtree(images), ["photos"]),
    "a file": (lambda images, masks: shutil.rmtree(images) or images.write_text("?"), ["photos"]),
    "not UTF-8": (lambda images, masks: open(os.fsencode(images) + b"/\xff.jpg", "w").close(), ["photos", "udcff.jpg"]),
    "a long name": (lambda images, masks: (images / f"{241 * 'n'}.jpg").touch(), ["photos", "longer than 240 bytes"]),
    "a line break": (lambda images, masks: (images / "a\nb.jpg").touch(), ["photos", "a\\nb.jpg"]),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_named_in_one_line_and_nothing_is_written(run, photos, tmp_path, name):
    spoil, named = BAD_FOLDERS[name]
    spoil(*photos)
    assert_refused(run("folder", photos[0], tmp_path / "x.h5", "--masks", photos[1], *SIZE), *named)
    assert_nothing_written(tmp_path)


def test_an_accent_stored_as_its_own_character_does_not_hide_the_mask(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "drawn").mkdir()
    save(tmp_path / "photos" / "nae\u0301vus.jpg", np.zeros((64, 96)))  # e, accent
    save(tmp_path / "drawn" / "na\u00e9vus.png".replace("na\u00e9", "na\u00e9"), np.full((64, 96), 255))
    code, out, err = run("folder", tmp_path / "photos", tmp_path / "x.h5", "--masks", tmp_path / "drawn", *SIZE)
    assert (code, "1 with a mask" in out) == (0, True), err
    assert read(tmp_path / "x.h5")["ids"] == ["na\u00e9vus"]


def test_a_folder_named_as_an_image_is_left_out(run, photos, tmp_path):
    (photos[0] / "y.jpg").mkdir()
    code, out, err = run("folder", photos[0], tmp_path / "x.h5", *SIZE)
    assert (code, err) == (0, "")
    assert "left out: 4 files (" in out
    assert ", 1 folder (y.jpg); --recursive reads folders" in out


def test_all_bad_files_are_named_at_once(run, photos, isic):
    images, masks = photos
    (images / "x.jpeg").write_text(HTML)
    save(masks / "-dash.png", np.full((64, 96), 100))
    save(masks / "\u00fcbung_segmentation.png", np.indices((64, 96))[0] // 30)
    code, _, err = run("folder", images, images.parent / "x.h5", "--masks", masks, *SIZE)
    *errors, last = err.splitlines()
    assert (code, len(errors)) == (2, 3)
    for error, name in zip(errors, ["-dash.png", "x.jpeg", "\u00fcbung_segmentation.png"]):
        assert error.startswith("error: ")
        assert name in error
    assert last.startswith("error: 3 files cannot be used, and nothing is written")
    image, mask = folders(isic)
    (image / "ISIC_0000001.jpg").write_text(HTML)
    save(mask / "ISIC_0000001_segmentation.png", np.full((64, 96), 100))  # both files of one pair
    code, _, err = run("isic", isic, images.parent / "x.h5", *SIZE)
    assert (code, len(err.splitlines())) == (2, 3)
    assert "2 files cannot be used" in err
    assert_nothing_written(images.parent)


def test_at_most_100_bad_files_are_named(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(120):
        (tmp_path / "photos" / f"{n:03d}.jpg").touch()
    code, _, err = run("folder", tmp_path / "photos", tmp_path / "x.h5", *SIZE)
    assert (code, len(err.splitlines())) == (2, 101)
    assert "error: 120 files cannot be used" in err


def photos_with_masks(folder, masks, exif=None, size=(64, 96)):
    """Save a plain JPEG for each mask, with an EXIF orientation; `masks`: a dict of file name to pixels."""
    for name in "photos", "drawn":
        (folder / name).mkdir()
    options = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    for name, pixels in masks.items():
        save(folder / "photos" / f"{Path(name).stem}.jpg", np.full((*size, 3), 150), **options)
        save(folder / "drawn" / name, pixels)
    return folder / "photos", folder / "x.h5", "--masks", folder / "drawn"


BLOCK = 255 * np.pad(np.ones((20, 30)), ((10, 34), (20, 46)))


@pytest.mark.parametrize(
    ("masks", "warning"),
    [
        ([BLOCK] * 8, None),
        ([255 - BLOCK] * 8, "warning: 8 of 8 masks cover all four corners of their picture ("),
        ([BLOCK] * 7 + [0 * BLOCK + 255], "warning: 1 of 8 masks cover all four corners"),
        ([255 * (np.indices((64, 96))[0] < 40)] * 3 + [BLOCK] * 5, "warning: 3 of 8 masks cover over half"),
        ([255 * (np.indices((64, 96))[0] < 40)] * 2 + [BLOCK] * 6, None),
    ],
)
def test_inverted_masks_are_one_warning(run, tmp_path, masks, warning):
    given = photos_with_masks(tmp_path, {f"{n}.png": mask for n, mask in enumerate(masks)})
    code, out, err = run("folder", *given, *SIZE)
    assert (code, "8 images, 8 with a mask" in out) == (0, True)
    assert err.startswith(warning) and err.count("\n") == 1 if warning else err == ""


@pytest.mark.parametrize(
    ("exif", "size", "mask", "doubtful"),
    [
        (2, (64, 96), (64, 96), True),
        (3, (64, 96), (128, 192), True),
        (4, (64, 96), (64, 96), True),
        (6, (64, 64), (64, 64), True),
        (8, (64, 64), (64, 64), True),
        (6, (999, 1000), (500, 500), True),  # almost square, and the mask has another size
        (6, (999, 1000), (1000, 999), False),
        (6, (64, 96), (96, 64), False),
        (1, (64, 96), (64, 96), False),
        (None, (64, 96), (64, 96), False),
    ],
)
def test_a_mask_whose_size_cannot_tell_which_way_it_was_drawn_is_named(run, tmp_path, exif, size, mask, doubtful):
    pixels = 255 * (np.indices(mask)[0] < mask[0] // 4)
    code, _, err = run("folder", *photos_with_masks(tmp_path, {"a.png": pixels}, exif, size), *SIZE)
    assert code == 0
    assert err.startswith("warning: 1 mask (a) taken as drawn on the picture as displayed") if doubtful else err == ""
    np.testing.assert_array_equal(read(tmp_path / "x.h5")["masks"][0], np.indices((32, 48))[0] < 8)


@pytest.mark.parametrize("size", [(64, 96), (999, 1000)])
def test_a_mask_drawn_on_the_picture_before_its_turn_is_refused_if_the_size_tells(run, tmp_path, size):
    given = photos_with_masks(tmp_path, {"a.png": 255 * (np.indices(size)[0] < 30)}, 6, size)
    assert_refused(run("folder", *given, *SIZE), "a.png", "aspect")


def test_masks_in_other_formats_are_read_and_lossy_ones_are_named(run, tmp_path):
    masks = dict.fromkeys(("a.bmp", "b.gif", "c.tiff", "d.pgm", "e.jpg", "f.png"), BLOCK)
    images, *rest = photos_with_masks(tmp_path, masks)
    for name in "f.json", "f.xcf", "f.png~":
        (tmp_path / "drawn" / name).write_text("{}")
    code, out, err = run("folder", images, *rest, *SIZE)
    assert (code, err) == (0, "")
    assert "6 images, 5 with a mask" in out
    assert out.splitlines()[-1].startswith("left out: 3 files (e.jpg, f.json, f.xcf); lossy compression blurs a mask")
    file = read(tmp_path / "x.h5")
    for has_mask, mask in zip(file["has_mask"], file["masks"]):
        assert mask.sum() == 150 * has_mask


@pytest.mark.parametrize("masks", [["a.jpg"], ["a.jp2", "notes.txt"], []])
def test_a_folder_without_a_mask_is_refused(run, tmp_path, masks):
    images, out, *_ = photos_with_masks(tmp_path, {"a.png": BLOCK})
    (tmp_path / "drawn" / "a.png").unlink()
    for name in masks:
        (tmp_path / "drawn" / name).write_bytes(b"any")
    result = run("folder", images, out, "--masks", tmp_path / "drawn", *SIZE)
    assert_refused(result, "drawn: no mask of any image, for example a.png", *masks)
    assert_nothing_written(tmp_path)


def test_subfolders_are_read_on_request(run, tmp_path):
    given = photos_with_masks(tmp_path, {"a.png": BLOCK, "b.png": BLOCK})
    for folder, suffix in ("photos", ".jpg"), ("drawn", ".png"):
        (tmp_path / folder / "sub").mkdir()
        (tmp_path / folder / f"b{suffix}").rename(tmp_path / folder / "sub" / f"a{suffix}")
    (tmp_path / "drawn").rename(tmp_path / "photos" / "drawn")  # masks are no images
    given = (*given[:3], tmp_path / "photos" / "drawn")
    code, out, _ = run("folder", *given, *SIZE)
    assert (code, "1 images, 1 with a mask" in out, "2 folders (sub, sub)" in out) == (0, True, True)
    code, out, err = run("folder", *given, *SIZE, "--force", "--recursive")
    assert (code, err, "left out" in out) == (0, "", False)
    file = read(tmp_path / "x.h5")
    assert file["ids"] == ["a", "sub__a"]
    assert file["has_mask"].all()
    assert file["files"][1] == "sub/a.jpg"
    save(tmp_path / "photos" / "sub__a.bmp", BLOCK)
    assert_refused(run("folder", *given, *SIZE, "--force", "--recursive"), "sub__a.bmp", "a.jpg")


def test_10000_files_are_found(tmp_path):
    for n in range(10_000):
        (tmp_path / f"{n:05d}.png").touch()
    pairs, _ = data.find_folder(tmp_path)
    assert [pair.id for pair in pairs] == [f"{n:05d}" for n in range(10_000)]


# ---------------------------------------------------------------------------------------------------- single pictures


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_fine_detail_becomes_its_average_and_coarse_detail_stays(tmp_path, suffix, channels):
    board = 255 * (np.indices((64, 96)).sum(0) % 2)
    image, original = read_image(save(tmp_path / f"x.{suffix}", board, quality=95), 32, 48, channels)
    assert (image.shape, image.dtype, original) == ((32, 48, channels), np.uint8, (64, 96))
    assert np.abs(image - 127.5).max() < 4
    board = 255 * ((np.indices((64, 96)) // 8).sum(0) % 2)
    image, _ = read_image(save(tmp_path / f"x.{suffix}", board, quality=95), 32, 48, channels)
    assert np.abs(image[1::4, 1::4, 0] - board[3::8, 3::8]).max() < 10


@pytest.mark.parametrize(("covered", "expected"), [(40, 10), (41, 10), (43, 11), (44, 11)])
def test_a_mask_is_cut_at_one_half(tmp_path, covered, expected):
    path = save(tmp_path / "x.png", 255 * (np.indices((128, 192))[1] < covered))
    mask, original = read_mask(path, 32, 48)
    assert (mask.dtype, original) == (np.uint8, (128, 192))
    np.testing.assert_array_equal(mask, np.indices((32, 48))[1] < expected)


def test_a_big_jpeg_reads_as_if_decoded_in_full(tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 200, (12, 16, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize((3200, 2400), Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + 6 * rng.standard_normal((2400, 3200, 1), np.float32)
    path = save(tmp_path / "x.jpg", pixels.clip(0, 255), quality=90)
    read = {}
    for channels, mode in (1, "L"), (3, "RGB"):
        read[channels], original = read_image(path, 192, 240, channels)
        with Image.open(path) as picture:
            full = np.array(picture.convert(mode).resize((240, 192), Image.Resampling.BILINEAR), float)
        difference = np.abs(read[channels] - full.reshape(192, 240, channels))
        assert original == (2400, 3200)
        assert difference.mean() < 2
        assert difference.max() < 10
    assert np.ptp(read[3].astype(int), axis=-1).max() > 50  # a picture in colour, and grey is its luminance
    assert np.abs(read[3] @ (0.299, 0.587, 0.114) - read[1][..., 0]).max() <= 2


@pytest.mark.parametrize("scale", [1, 12])
def test_a_turned_photograph_is_read_as_displayed(tmp_path, scale):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned clockwise: the first row is the right column
    stored = np.where(np.indices((64 * scale, 96 * scale))[0] < 32 * scale, 220, 30)
    image, original = read_image(save(tmp_path / "x.jpg", stored, exif=exif), 48, 32, 1)
    assert original == (96 * scale, 64 * scale)
    assert image[:, 18:].min() > 200
    assert image[:, :14].max() < 50


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_0_and_1_and_masks_with_grey_edges_are_read(tmp_path, white):
    y, x = np.indices((64, 96))
    lesion = (y >= 16) & (x >= 32)
    pixels = lesion * white
    if white == 255:  # 40 grey pixels, 0.7 % of all: bright in the lesion, dark outside
        pixels[16, 40:60], pixels[15, 40:60] = 200, 60
    mask, _ = read_mask(save(tmp_path / "x.png", pixels), 64, 96)
    np.testing.assert_array_equal(mask, lesion)


def test_masks_are_read_as_editors_write_them(tmp_path):
    """Two values are a mask in any Pillow mode: pixels that are neither black nor transparent are lesion."""
    lesion = np.indices((64, 96))[1] < 30
    grey = Image.fromarray(np.uint8(255) * lesion)
    red = Image.fromarray(lesion[..., None] * np.array([200, 0, 1], np.uint8))
    blue = Image.fromarray(lesion[..., None] * np.array([0, 0, 1], np.uint8))  # grey value 0
    white_on_nothing = Image.merge("RGBA", [Image.new("L", grey.size, 255)] * 3 + [grey])
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "bit.png": grey.convert("1"),
        "bit.tif": grey.convert("1"),
        "rgb.bmp": grey.convert("RGB"),
        "palette.png": red.convert("P", palette=Image.Palette.ADAPTIVE),
        "red.png": red,
        "blue.png": blue,
        "dim.png": Image.fromarray(np.uint8(100) * lesion),
        "rgba.png": grey.convert("RGBA"),
        "transparent.png": white_on_nothing,
        "labels.tif": Image.fromarray(lesion.astype(np.uint16)),
        "labels.png": Image.fromarray(lesion.astype(np.uint16) * np.uint16(65535)),
        "labels32.tif": Image.fromarray(lesion.astype(np.int32)),
        "float.tif": Image.fromarray(lesion.astype(np.float32)),
        "gif.gif": grey,
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(open_mask(tmp_path / name)), 255 * lesion, err_msg=name)
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    np.testing.assert_array_equal(np.asarray(open_mask(tmp_path / "turned.png")), 255 * lesion)


def test_what_is_no_mask_is_refused_in_any_mode(tmp_path):
    ramp = np.indices((64, 96)).sum(0)
    pictures = {
        "ramp.png": Image.fromarray(ramp.astype(np.uint8)),
        "deep.png": Image.fromarray((300 * ramp).astype(np.uint16)),
        "float.tif": Image.fromarray(ramp.astype(np.float32)),
        "colours.png": Image.fromarray(np.stack([ramp, 0 * ramp, ramp[::-1]], -1).astype(np.uint8)),
        "grey and white.png": Image.fromarray(np.where(ramp < 60, 100, 255).astype(np.uint8)),
        "plain.png": Image.new("L", (96, 64), 100),
        "mask.jpg": Image.new("L", (96, 64), 255),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            open_mask(tmp_path / name)
    Image.new("1", (96, 64)).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("1", (96, 64), 1)])
    with pytest.raises(UserError, match=r"pages\.tif: 2 pages"):
        open_mask(tmp_path / "pages.tif")


# ---------------------------------------------------------------------------------------------------------- bad input


IMAGE, MASK = (folder / "ISIC_0000002" for folder in folders(Path()))
IMAGE, MASK = IMAGE.with_suffix(".jpg"), MASK.with_name("ISIC_0000002_segmentation.png")
HTML = "<html>not found</html>\n" * 20
BAD_INPUTS = {  # a function that damages the folder, and the name in the message
    "folder missing": (shutil.rmtree, "isic"),
    "folder empty": (lambda isic: [shutil.rmtree(folder) for folder in folders(isic)], "isic"),
    "image without mask": (lambda isic: (isic / MASK).unlink(), IMAGE),
    "mask without image": (lambda isic: (isic / IMAGE).unlink(), MASK),
    "no masks at all": (lambda isic: shutil.rmtree((isic / MASK).parent), "ISIC_0000001.jpg"),
    "two masks": (lambda isic: shutil.copy(isic / MASK, isic / MASK.parent / "ISIC_0000002_Segmentation.png"), MASK),
    "an id in two parts": (lambda isic: save_pair(isic, "ISIC_0000002", part="Test_v2"), "ISIC_0000002"),
    "truncated image": (lambda isic: truncate(isic / IMAGE), IMAGE),
    "truncated mask": (lambda isic: truncate(isic / MASK), MASK),
    "empty file": (lambda isic: (isic / IMAGE).write_bytes(b""), IMAGE),
    "text named jpg": (lambda isic: (isic / IMAGE).write_text(HTML), IMAGE),
    "text named png": (lambda isic: (isic / MASK).write_text(HTML), MASK),
    "mask of another aspect": (lambda isic: save(isic / MASK, np.full((64, 90), 255)), MASK),
    "mask turned": (lambda isic: save(isic / MASK, np.full((96, 64), 255)), MASK),
    "gradient as mask": (lambda isic: save(isic / MASK, np.indices((64, 96)).sum(0) * 255 / 158), MASK),
    "black mask": (lambda isic: save(isic / MASK, np.zeros((64, 96))), MASK),
    "lesion of one pixel": (lambda isic: save(isic / MASK, 255 * np.eye(64, 96) * (np.arange(96) == 5)), MASK),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_named_in_one_line_and_nothing_is_written(run, isic, name):
    spoil, named = BAD_INPUTS[name]
    spoil(isic)
    assert_refused(run("isic", isic, isic.parent / "x.h5", *SIZE), named)
    assert_nothing_written(isic.parent)


BAD_NUMBERS = [(option, value) for option in ("--height", "--width") for value in (100, 8, 0, -16)]


@pytest.mark.parametrize("numbers", [*BAD_NUMBERS, ("--images", 0)])
def test_a_number_that_makes_no_sense_is_refused(run, isic, numbers):
    for command in [("synthetic",), ("isic", isic)][: 1 if "--images" in numbers else 2]:
        assert_refused(run(*command, isic.parent / "x.h5", *SIZE, *numbers), "{} {}".format(*numbers))
    assert_nothing_written(isic.parent)


def test_an_existing_output_is_kept_or_with_force_replaced(run, isic):
    out = isic.parent / "x.h5"
    out.write_text("precious")
    assert_refused(run("isic", isic, out, *SIZE), "x.h5", "--force")
    truncate(isic / IMAGE)
    assert_refused(run("isic", isic, out, *SIZE, "--force"), IMAGE)
    assert out.read_text() == "precious"
    save_pair(isic, "ISIC_0000002")
    assert run("isic", isic, out, *SIZE, "--force")[0] == 0
    assert len(read(out)["ids"]) == 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_writer_that_dies_leaves_the_old_file(tmp_path, error):
    def rows():
        yield data.draw_row(0, 1, 16, 16, 1)
        raise error

    (tmp_path / "x.h5").write_text("precious")
    with pytest.raises(UserError, match=r"x\.h5 exists"):
        data.write_dataset(tmp_path / "x.h5", rows(), 2, 16, 16, 1, "test")
    with pytest.raises(error):
        data.write_dataset(tmp_path / "x.h5", rows(), 2, 16, 16, 1, "test", force=True)
    assert (tmp_path / "x.h5").read_text() == "precious"
    assert os.listdir(tmp_path) == ["x.h5"]


def test_too_small_a_disk_is_noticed_before_anything_is_written(run, isic, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 32 * 48 * 2))  # without any overhead
    assert_refused(run("isic", isic, isic.parent / "x.h5", *SIZE), "x.h5", "MB free")
    assert_nothing_written(isic.parent)


def test_16_bit_and_missing_pictures_are_refused(tmp_path):
    Image.fromarray(np.full((64, 96), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png.*8 bits"):
        read_image(tmp_path / "deep.png", 32, 48, 1)
    with pytest.raises(UserError, match=r"none\.png"):
        read_image(tmp_path / "none.png", 32, 48, 1)


# --------------------------------------------------------------------------------------------------- reading the file


@pytest.fixture
def small(tmp_path):
    """A data file of 250 colour images of noise, each with another brightness: (path, images, masks)."""
    rng = np.random.default_rng(0)
    images = (rng.random((250, 16, 16, 3)) * rng.integers(20, 256, (250, 1, 1, 3))).astype(np.uint8)
    masks = (rng.random((250, 16, 16)) < 0.3).astype(np.uint8)
    rows = [data.Row(f"ISIC_{n:07d}", "train", (600, 800), images[n], masks[n]) for n in range(250)]
    data.write_dataset(tmp_path / "small.h5", rows, 250, 16, 16, 3, "test")
    return tmp_path / "small.h5", images, masks


def test_images_come_in_the_order_asked_for(small):
    path, images, masks = small
    with data.Dataset(path) as dataset:
        assert (len(dataset), dataset.height, dataset.width, dataset.channels) == (250, 16, 16, 3)
        for positions in [249, 0, 7, 7, 3], [5], [], np.array([9, 8, 9]):
            np.testing.assert_array_equal(dataset.images(positions), images[np.array(positions, int)])
            np.testing.assert_array_equal(dataset.masks(positions), masks[np.array(positions, int)])


def test_normalisation_is_by_numpys_mean_and_deviation_of_these_images_only(small):
    path, images, _ = small
    positions = np.random.default_rng(1).permutation(250)[:230]
    with data.Dataset(path) as dataset:
        mean, std = data.normalisation(dataset, positions)
    np.testing.assert_allclose(mean, images[positions].mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, images[positions].std((0, 1, 2)), rtol=1e-9)
    assert np.abs(mean - images.mean((0, 1, 2))).max() > 0.1  # the other images would change it
    inputs = data.normalise(np.array([[[130, 10]], [[70, 0]]], np.uint8), [100.0, 20.0], [15.0, 4.0])
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs, [[[2, -2.5]], [[-2, -5]]])


BAD_FILES = {
    "missing": Path.unlink,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("id,age\n" * 999),
    "foreign": lambda path: h5py.File(path, "w").create_dataset("images", (3, 16, 16, 1), "uint8"),
    "of another version": lambda path: h5py.File(path, "r+").attrs.update(layout_version=99),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_data_file_is_refused(run, small, name):
    BAD_FILES[name](small[0])
    with pytest.raises(UserError, match=r"small\.h5"):
        data.Dataset(small[0])
    assert_refused(run("info", small[0]), "small.h5")
    assert_refused(run("show", small[0], small[0].with_name("sheet.png")), "small.h5")


# ----------------------------------------------------------------------------------------------------------- the split


def fake_dataset(train, others=0):
    """What `split` reads: `train` images, including the near-duplicates, and `others`, all shuffled."""
    ids = [id for pair in data.NEAR_DUPLICATES for id in pair] + [f"ISIC_{n:07d}" for n in range(20000, 24000)]
    order = np.random.default_rng(0).permutation(train + others)
    part = np.array(["train"] * train + ["test"] * others, object)[order]
    ids = np.array(ids[: train + others], object)[order]
    return SimpleNamespace(ids=ids, part=part, has_mask=np.ones(len(ids), bool), path="x.h5")


def test_the_papers_split_is_of_training_images_and_depends_on_its_seed_only():
    dataset = fake_dataset(2000, 750)
    split, again, other = (data.split(dataset, seed=seed) for seed in (1, 1, 2))
    assert [len(positions) for positions in split] == [600, 1000, 400]
    assert set(np.concatenate(split)) == set(np.flatnonzero(dataset.part == "train"))
    assert all((np.diff(positions) > 0).all() for positions in split)
    np.testing.assert_array_equal(np.concatenate(split), np.concatenate(again))
    assert 100 < len(set(split.initial) & set(other.initial)) < 260  # 180 = 600 * 600 / 2000 by chance


def test_the_test_images_do_not_depend_on_how_many_are_labelled_or_in_the_pool():
    dataset = fake_dataset(2000)
    for seed in range(50):
        splits = [data.split(dataset, *n, 400, seed) for n in ((600, 1000), (100, 1500), (1600, 0), (100, 500))]
        for other in splits[1:]:
            np.testing.assert_array_equal(other.test, splits[0].test)


@pytest.mark.parametrize("unused", [0, 8])
@pytest.mark.parametrize("counts", [(600, 1000, 400), (7, 1001, 13), (0, 1990, 10), (6, 6, 6), (8, 9, 7), (12, 0, 12)])
def test_near_duplicates_are_on_one_side(counts, unused):
    dataset = fake_dataset(sum(counts) + unused, 30)
    for seed in range(50):
        split = data.split(dataset, *counts, seed=seed)
        assert tuple(map(len, split)) == counts
        assert len(set(np.concatenate(split))) == sum(counts)
        sides = [set(dataset.ids[positions]) for positions in split]
        for one, other in data.NEAR_DUPLICATES:
            assert [one in side for side in sides] == [other in side for side in sides], seed


def test_an_impossible_split_is_refused_with_its_numbers():
    with pytest.raises(UserError, match=r"x\.h5 has 1999 training images.* 600 .* 1000 .* 400 "):
        data.split(fake_dataset(1999, 100))
    with pytest.raises(UserError, match=r"near-duplicates ISIC_\d+ and ISIC_\d+"):
        data.split(fake_dataset(6), 3, 3, 0)  # the three pairs


@pytest.mark.parametrize(
    ("masks", "counts", "labelled"),
    [
        (90, (40, 200, 30), 40),  # enough for the test and all labelled images
        (50, (40, 200, 30), 20),  # 20 labelled images have no mask
        (30, (40, 200, 30), 0),
        (0, (40, 200, 0), 0),
        (50, (100, 200, 0), 50),
    ],
)
def test_images_with_a_mask_are_for_test_first_then_labelled_and_only_then_in_the_pool(masks, counts, labelled):
    dataset = fake_dataset(300, 40)
    for seed in range(20):
        chosen = np.random.default_rng(seed).permutation(np.flatnonzero(dataset.part == "train"))
        if masks == counts[2]:  # all are for test: a near-duplicate without a mask could not join the other one
            chosen = chosen[~np.isin(dataset.ids[chosen], data.NEAR_DUPLICATES)]
        chosen = chosen[:masks]
        dataset.has_mask[:] = False
        dataset.has_mask[chosen] = True
        split = data.split(dataset, *counts, seed=seed)
        again = data.split(dataset, *counts, seed=seed)
        np.testing.assert_array_equal(np.concatenate(split), np.concatenate(again))
        assert tuple(map(len, split)) == counts
        assert len(set(np.concatenate(split))) == sum(counts)
        assert all((np.diff(positions) > 0).all() for positions in split)
        assert (dataset.part[np.concatenate(split)] == "train").all()
        assert dataset.has_mask[split.test].all()
        assert abs(dataset.has_mask[split.initial].sum() - labelled) <= 3  # near-duplicates may change it
        sides = [set(dataset.ids[positions]) for positions in split]
        for one, other in data.NEAR_DUPLICATES:
            assert [one in side for side in sides] == [other in side for side in sides], seed


def test_which_images_without_a_mask_come_into_the_pool_is_drawn_by_the_seed():
    dataset = fake_dataset(2000)
    dataset.has_mask[50:] = False
    split, other = (data.split(dataset, 30, 600, 20, seed=seed) for seed in (1, 2))
    assert 100 < len(set(split.pool) & set(other.pool)) < 280  # 600 * 600 / 1950 = 185 by chance


def test_too_few_masks_for_the_test_are_refused_with_their_numbers():
    dataset = fake_dataset(300)
    dataset.has_mask[20:] = False
    with pytest.raises(
        UserError, match=r"x\.h5 has 20 training images with a mask, too few for 21 test images; lower --test"
    ):
        data.split(dataset, 10, 200, 21)


@pytest.fixture
def pictured(monkeypatch):
    """`fake_dataset` of 2000 images, whose thumbnails are points in three clouds, in turn."""
    dataset = fake_dataset(2000)
    monkeypatch.setattr(data, "thumbnails", lambda _, positions: np.stack([positions % 3 * 9, positions / 1e4], 1))
    return dataset


@pytest.mark.parametrize("start", ["random", "typical"])
@pytest.mark.parametrize("counts", [(600, 1000, 400), (100, 1500, 400), (9, 6, 10)])
def test_a_new_start_has_other_labels_and_the_same_test_images(pictured, start, counts):
    parts = data.split(pictured, *counts)
    starts = [data.start_anew(parts, pictured, start, seed) for seed in (1, 1, 2)]
    for found in starts:
        assert tuple(map(len, found)) == counts
        np.testing.assert_array_equal(found.test, parts.test)
        assert sorted([*found.initial, *found.pool]) == sorted([*parts.initial, *parts.pool])
        assert all((np.diff(positions) > 0).all() for positions in found)
        sides = [set(pictured.ids[positions]) for positions in found]
        for one, other in data.NEAR_DUPLICATES:
            assert [one in side for side in sides] == [other in side for side in sides]
    np.testing.assert_array_equal(starts[0].initial, starts[1].initial)
    assert (starts[0].initial != starts[2].initial).any()
    assert (starts[0].initial != parts.initial).any()


def test_without_a_new_start_the_split_is_as_it_was(pictured):
    parts = data.split(pictured)
    assert data.start_anew(parts, pictured, "random", 0) is parts


def test_typical_first_labels_are_of_every_kind_of_image(pictured):
    found = data.start_anew(data.split(pictured, 9, 1591, 400), pictured, "typical", 1)
    assert np.bincount(found.initial % 3).min() >= 2


def test_first_labels_of_a_new_start_are_those_with_a_mask(pictured):
    pictured.has_mask[1000:] = False
    parts = data.split(pictured, 30, 600, 20)
    for start in "random", "typical":
        assert pictured.has_mask[data.start_anew(parts, pictured, start, 1).initial].all()


def test_a_thumbnail_has_the_means_of_16_times_16_parts(small):
    with data.Dataset(small[0]) as dataset:
        height, width = dataset.height // 16, dataset.width // 16
        image = dataset.images([1])[0].astype(float)
        (found,) = data.thumbnails(dataset, [1])
        assert found.shape == (256 * dataset.channels,)
        third = image[:height, 2 * width : 3 * width].mean((0, 1))  # of the first row
        np.testing.assert_allclose(found[2 * dataset.channels : 3 * dataset.channels], third, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- synthetic lesions


@pytest.mark.parametrize(("height", "width", "count"), [(16, 16, 100), (48, 64, 200), (64, 48, 100), (192, 240, 10)])
def test_a_lesion_has_an_image_and_a_mask_neither_empty_nor_full(height, width, count):
    for seed in range(count):
        image, mask = draw_lesion(np.random.default_rng(seed), height, width)
        assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((height, width), np.uint8)
        assert set(np.unique(mask)) == {0, 1}, seed


def test_synthetic_lesions_are_those_of_the_seed_whatever_their_number(run, tmp_path):
    for name, count, seed, channels in ("a", 5, 1, 1), ("b", 5, 1, 1), ("c", 3, 1, 3), ("d", 5, 2, 1):
        options = "--images", count, "--seed", seed, "--channels", channels
        assert run("synthetic", tmp_path / name, *options, *SIZE)[0] == 0
    a, b, c, d = (read(tmp_path / name) for name in "abcd")
    assert len(set(a["ids"])) == 5
    assert set(a["part"]) == {"train"}
    for name in ("images", "masks", "ids"):
        np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_array_equal(a["masks"][:3], c["masks"])
    assert np.abs(c["images"] @ (0.299, 0.587, 0.114) - a["images"][:3, ..., 0]).max() <= 1
    assert len(np.unique(np.concatenate([a["images"], d["images"]]), axis=0)) == 10


@pytest.mark.parametrize("channels", [1, 3])
def test_show_draws_the_outlines_on_a_sheet(run, tmp_path, channels):
    assert run("synthetic", tmp_path / "x.h5", "--images", 8, "--channels", channels, *SIZE)[0] == 0
    code, _, err = run("show", tmp_path / "x.h5", tmp_path / "sheet.png", "--images", 7)
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "sheet.png") as sheet:
        red, green, blue = np.moveaxis(np.array(sheet.convert("RGB")), -1, 0)
    assert np.sum((red < 80) & (green > 180) & (blue > 180)) > 200
    assert_refused(run("show", tmp_path / "x.h5", tmp_path / "sheet.png"), "sheet.png", "--force")


def test_names_are_drawn_as_they_are_though_a_formula_could_be_read_in_them(run, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "cost$5%$.png", np.full((64, 96, 3), 40))
    assert run("folder", tmp_path / "in", tmp_path / "x.h5", *SIZE)[0] == 0
    assert run("show", tmp_path / "x.h5", tmp_path / "sheet.png")[::2] == (0, "")
    image = np.zeros((4, 4, 1), np.uint8)
    example = "$_$", image, None, [image[..., 0]], *image.T, *image.T
    figures.figure_examples([("random", [example])], tmp_path / "e.png")
    figures.figure_overview("p$#1$", None, None, [("$_$", image, image[..., 0] > 0, None)], tmp_path / "o.png")


# --------------------------------------------------------------------------------------------------------- real images


@pytest.mark.skipif("ISIC2017_DIR" not in os.environ, reason="ISIC2017_DIR does not name the challenge's folders")
def test_the_real_training_set_is_found_and_read():
    pairs = [pair for pair in data.find_pairs(os.environ["ISIC2017_DIR"])[0] if pair.part == "train"]
    assert len(pairs) == 2000
    assert {id for pair in data.NEAR_DUPLICATES for id in pair} <= {pair.id for pair in pairs}
    read = [data.read_pair(pair, 192, 240, 1) for pair in pairs[::200]]
    assert all(0.002 < row.mask.mean() < 0.95 for row in read)
    darker = [row.image[row.mask == 1].mean() < row.image[row.mask == 0].mean() for row in read]
    assert sum(darker) >= 8  # than the skin, unless the picture has black corners


# --------------------------------------------------------------------------------------- mistakes at the command line


@pytest.fixture
def small_file(run, tmp_path):
    assert run("synthetic", tmp_path / "small.h5", "--images", 2, *SIZE)[0] == 0
    return tmp_path / "small.h5"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("show FILE sheet", "sheet"),
        ("show FILE sheet.xyz", "sheet.xyz"),
        ("show FILE sheet.png --images 0", "--images 0"),
        ("show FILE FOLDER --force", "folder"),
        ("synthetic new.h5 --images 1 --seed -1", "--seed -1"),
        ("synthetic FOLDER --images 1 --force", "folder"),
        ("synthetic FILE/new.h5 --images 1", "small.h5"),
        ("info FOLDER", "folder"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_sentence(run, small_file, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = arguments.replace("FILE", small_file.name).replace("FOLDER", "folder").split()
    code, _, err = run(*words)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: ")
    assert named in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("limit", [50_000, 200_000, 400_000])
def test_a_disk_that_fills_up_is_one_sentence(tmp_path, limit):
    """In a process whose files cannot grow beyond `limit` bytes, as on a disk that fills up while it is written to."""
    resource = pytest.importorskip("resource")
    root = Path(data.__file__).parent
    command = [sys.executable, root / "data.py", "synthetic", "x.h5", "--images", "100", *map(str, SIZE)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: x.h5 cannot be read or written: File too large; free some space")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_damaged_inside_is_refused_when_it_is_read(small_file):
    content = bytearray(small_file.read_bytes())
    tree = content.index(b"FAHD")  # the index of some dataset's chunks
    content[tree : tree + 4] = b"XXXX"
    small_file.write_bytes(content)

    def read_all():
        with data.Dataset(small_file) as dataset:
            return dataset.images([0, 1]), dataset.masks([0, 1])

    with pytest.raises(UserError, match=r"small\.h5: not written by data\.py, or damaged"):
        read_all()


def test_an_almost_square_image_that_is_turned_keeps_its_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.jpg", np.zeros((999, 1000, 3)), exif=exif)
    assert read_image(path, 32, 48, 1)[1] == (1000, 999)


def test_the_same_content_has_the_same_fingerprint_wherever_and_whenever_it_is_written(tmp_path):
    first = write_blobs(tmp_path / "first.h5", 3, 32, 32)
    time.sleep(1.1)  # HDF5 stores the time, in seconds
    again = write_blobs(tmp_path / "again.h5", 3, 32, 32)
    assert first.read_bytes() != again.read_bytes()
    with data.Dataset(first) as dataset:
        expected = dataset.fingerprint()
    with data.Dataset(again) as dataset:
        assert dataset.fingerprint() == expected
    with h5py.File(again, "a") as file:
        file["masks"][2, 4, 4] = 1 - file["masks"][2, 4, 4]
    with data.Dataset(again) as dataset:
        assert dataset.fingerprint() != expected


@pytest.mark.parametrize(
    "positions", [[], [3], [0, 1, 2, 3], [5, 4, 3], [2, 2, 3, 3, 4], [9, 0, 1, 7, 8, 2], range(10)]
)
def test_images_come_in_the_order_of_the_positions(tmp_path, positions):
    write_blobs(tmp_path / "x.h5", 10, 16, 32)
    with h5py.File(tmp_path / "x.h5") as file:
        images, masks = file["images"][:], file["masks"][:]
    with data.Dataset(tmp_path / "x.h5") as dataset:
        for given in positions, np.array(positions, int):
            np.testing.assert_array_equal(dataset.images(given), images[list(positions)], strict=True)
            np.testing.assert_array_equal(dataset.masks(given), masks[list(positions)], strict=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_artefacts_leave_the_lesion_visible(monkeypatch, channels):
    """Without hairs, bubbles and rulers, which may cross a lesion."""
    for name in "draw_hairs", "draw_bubbles":
        monkeypatch.setattr(synthetic, name, lambda rng, *_: np.zeros((48, 64), "f4"))
    monkeypatch.setattr(synthetic, "draw_ruler", lambda *_: None)
    y, x = np.mgrid[:48, :64]
    mask = np.hypot(y - 20, x - 40) < 12
    image = np.full((48, 64, channels), 128, np.uint8)
    changed = []
    for seed in range(200):
        drawn = draw_artefacts(np.random.default_rng(seed), image, mask)
        assert (drawn.shape, drawn.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(drawn, draw_artefacts(np.random.default_rng(seed), image, mask))
        far = np.abs(drawn.astype(int) - image).max(-1) > 90
        assert far[mask].mean() <= 0.15  # at most a twentieth by each of them
        changed.append((drawn != image).any(-1).mean())
    assert (image == 128).all()
    assert 0.1 < np.mean(np.array(changed) == 0) < 0.5
    assert max(changed) > 0.3


def test_artefacts_of_an_empty_mask_may_be_anywhere():
    image = np.full((48, 64, 3), 128, np.uint8)
    drawn = [draw_artefacts(np.random.default_rng(seed), image, np.zeros((48, 64), bool)) for seed in range(20)]
    assert np.mean([(one != image).any() for one in drawn]) > 0.5
