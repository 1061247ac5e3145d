"""Pictures of every kind, for predict.py and data.py: what is read is read rightly, what is not is one sentence."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
import predict
from pictures import read_image, read_mask
from utils import UserError, read_csv, run_command

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as data.py has it, for its users
HEIGHT, WIDTH = 48, 64
LEVEL = np.linspace(20, 235, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round().astype(np.uint8)  # lighter row by row


def png(width, height, depth=8, color=0, rows=b"", extra=b""):
    """The bytes of a PNG file, written by hand: Pillow writes no 16-bit colour, and no false sizes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_rows(channels):
    """LEVEL as 16-bit rows of a PNG file, the low byte full of noise."""
    high = np.repeat(LEVEL[..., None], channels, -1).astype(np.uint16) << 8
    pixels = (high | np.random.default_rng(0).integers(0, 256, high.shape, np.uint16)).astype(">u2")
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


GREY = Image.fromarray(LEVEL)
COLOR = GREY.convert("RGB")
INVERTED = Image.fromarray(255 - LEVEL)
HALF_SEEN = Image.merge("RGBA", (*[GREY] * 3, Image.fromarray(np.tile(np.uint8([0, 255]), (HEIGHT, WIDTH // 2)))))
# What looks like LEVEL: a name to a function that writes the file.
GOOD = {
    "png_named.jpg": lambda path: GREY.save(path, "PNG"),
    "jpeg_named.png": lambda path: GREY.save(path, "JPEG", quality=98),
    "cmyk.jpg": lambda path: COLOR.convert("CMYK").save(path, quality=98),
    "progressive.jpg": lambda path: COLOR.save(path, progressive=True, quality=98),
    "several.jpg": lambda path: COLOR.save(path, "MPO", save_all=True, append_images=[INVERTED.convert("RGB")]),
    "cmyk.tif": lambda path: COLOR.convert("CMYK").save(path),
    "compressed.tif": lambda path: COLOR.save(path, compression="tiff_lzw"),
    "pages.tif": lambda path: GREY.save(path, save_all=True, append_images=[INVERTED]),
    "palette.png": lambda path: GREY.convert("P").save(path),
    "transparent_palette.png": lambda path: GREY.convert("P").save(path, transparency=bytes(range(256))),
    "transparent_color.png": lambda path: COLOR.save(path, transparency=(20, 20, 20)),
    "alpha.png": lambda path: HALF_SEEN.save(path),
    "grey_alpha.png": lambda path: HALF_SEEN.convert("LA").save(path),
    "moving.png": lambda path: GREY.save(path, save_all=True, append_images=[INVERTED]),
    "moving.gif": lambda path: GREY.save(path, save_all=True, append_images=[INVERTED]),
    "moving.webp": lambda path: COLOR.save(path, save_all=True, append_images=[INVERTED.convert("RGB")], quality=98),
    "16_bits_color.png": lambda path: path.write_bytes(png(WIDTH, HEIGHT, 16, 2, deep_rows(3))),
    "16_bits_alpha.png": lambda path: path.write_bytes(png(WIDTH, HEIGHT, 16, 4, deep_rows(2))),
    "plain.bmp": GREY.save,
    "plain.ppm": COLOR.save,
    "plain.jp2": GREY.save,
    **{
        f"turned_{number}.{kind}": lambda path, back=back, number=number: GREY.transpose(back).save(
            path, exif=orientation(number), quality=98
        )
        for kind in ("jpg", "png", "tif")
        for number, back in {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }.items()
    },
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", GOOD)
def test_an_unusual_picture_is_read_as_it_is_displayed(tmp_path, name, channels):
    GOOD[name](tmp_path / name)
    pixels, size = read_image(tmp_path / name, HEIGHT, WIDTH, channels)
    assert size == (HEIGHT, WIDTH)
    assert pixels.shape == (HEIGHT, WIDTH, channels)
    assert np.abs(pixels.astype(int) - LEVEL[..., None]).max() <= 6


def test_a_picture_of_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(LEVEL > 127).save(tmp_path / "x.png")
    pixels, _ = read_image(tmp_path / "x.png", HEIGHT, WIDTH, 1)
    np.testing.assert_array_equal(pixels[..., 0], 255 * (LEVEL > 127))


LESION = LEVEL > 127
MASKS = {
    "one_bit.png": lambda path: Image.fromarray(LESION).save(path),
    "palette.png": lambda path: Image.fromarray(255 * LESION.astype(np.uint8)).convert("P").save(path),
    "color.png": lambda path: Image.fromarray(255 * LESION.astype(np.uint8)).convert("RGB").save(path),
    "alpha.png": lambda path: Image.fromarray(255 * LESION.astype(np.uint8)).convert("LA").save(path),
    "16_bits.png": lambda path: Image.fromarray(65535 * LESION.astype(np.uint16)).save(path),
    "16_bits_of_0_and_1.png": lambda path: Image.fromarray(LESION.astype(np.uint16)).save(path),
    "turned.png": lambda path: (
        Image.fromarray(LESION).transpose(Image.Transpose.ROTATE_90).save(path, exif=orientation(6))
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_unusual_mask_is_read_as_it_is_displayed(tmp_path, name):
    MASKS[name](tmp_path / name)
    mask, size = read_mask(tmp_path / name, HEIGHT, WIDTH)
    assert size == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask, LESION)


def test_a_jpeg_is_no_mask_whatever_its_name(tmp_path):
    """Its blur would move the outline."""
    path = tmp_path / "mask.png"
    Image.fromarray(255 * LESION.astype(np.uint8)).save(path, "JPEG", quality=98)
    with pytest.raises(UserError, match=r"mask\.png: a JPEG blurs"):
        read_mask(path, HEIGHT, WIDTH)


def truncated(name):
    def write(path):
        GOOD[name](path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


BOMB = png(60_000, 60_000, 8, 0, bytes(60_001))
BAD = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>not found</html>\n" * 20),
    "zeros.jpg": lambda path: path.write_bytes(bytes(10_000)),
    "script.jpg": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n%%EOF\n"),
    "bomb.png": lambda path: path.write_bytes(BOMB),
    "no_size.png": lambda path: path.write_bytes(png(0, 0)),
    "no_pixels.png": lambda path: path.write_bytes(png(WIDTH, HEIGHT)),
    "much_text.png": lambda path: path.write_bytes(png(8, 8, extra=text_bomb())),
    "16_bits.png": lambda path: path.write_bytes(png(WIDTH, HEIGHT, 16, 0, deep_rows(1))),
    "16_bits.tif": lambda path: Image.fromarray(LEVEL.astype(np.uint16) * 257).save(path),
    "32_bits.tif": lambda path: Image.fromarray(LEVEL.astype(np.int32)).save(path),
    "float.tif": lambda path: Image.fromarray(LEVEL.astype(np.float32)).save(path),
    "lab.tif": lambda path: Image.new("LAB", (WIDTH, HEIGHT)).save(path),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "folder.png": lambda path: path.mkdir(),
    "nowhere.png": lambda path: path.symlink_to("nothing"),
    "loop.png": lambda path: path.symlink_to(path),
    "line\nbreak.png": lambda path: path.write_text("no picture"),
    "\x1b[31mred.png": lambda path: path.write_text("no picture"),
    **{f"half_{name}": truncated(name) for name in GOOD if name.split(".")[0] in ("plain", "cmyk", "progressive")},
    **{f"half_{name}": truncated(name) for name in ("palette.png", "moving.gif", "moving.webp", "compressed.tif")},
}


def text_bomb():
    """A chunk of 50 kB that unpacks to 50 MB of text."""
    content = b"Comment\0\0" + zlib.compress(bytes(50_000_000))
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_what_is_no_picture_is_refused(tmp_path, name, read):
    BAD[name](tmp_path / name)
    with pytest.raises(UserError) as refusal:
        read(tmp_path / name, 32, 48, *([1] if read is read_image else []))
    assert str(refusal.value).startswith(f"{tmp_path / name}: ")


BOMBS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pictures import read_image
from utils import UserError
for path in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        print(*read_image(path, 32, 48, 1)[1], end=" ")
    except UserError as error:
        print("refused", end=" ")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_takes_no_memory_and_a_large_picture_brings_no_warning(tmp_path):
    """In a process of its own, for its memory and its stderr: 3,600 megapixels, 100, of which Pillow would warn, and
    30, the most that the challenge has."""
    (tmp_path / "bomb.png").write_bytes(BOMB)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("L", (6748, 4499), 99).save(tmp_path / "real.jpg")
    # An orientation of type ASCII; four tags more.
    COLOR.save(tmp_path / "odd_turn.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0")
    COLOR.save(tmp_path / "odd_tags.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0" * 9)
    paths = [tmp_path / name for name in ("bomb.png", "large.png", "real.jpg", "odd_turn.jpg", "odd_tags.jpg")]
    done = subprocess.run([sys.executable, "-c", BOMBS, ROOT, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    assert [size for size, _ in found] == ["refused", "10000 10000", "4499 6748", "48 64", "48 64"]
    assert int(found[0][1]) < 20_000  # kB


TURNED = struct.pack("<HHLL", 0x0112, 3, 1, 6)  # an entry of EXIF: tag, type, count, value
# At which Pillow's `exif_transpose` fails: a header cut off, a text where a fraction is due.
ODD_EXIF = {
    "header": (b"II*\0", (48, 64)),
    "fraction": (b"II*\0\x08\0\0\0\x02\0" + TURNED + struct.pack("<HHLLL", 0x011A, 2, 2, 0x36, 0), (64, 48)),
}


@pytest.mark.parametrize("name", ODD_EXIF)
def test_odd_notes_beside_the_pixels_are_no_reason_to_refuse_them(tmp_path, name):
    exif, size = ODD_EXIF[name]
    for kind, picture, read in (
        ("jpg", COLOR, read_image),
        ("png", INVERTED.point(lambda v: 255 * (v > 99)), read_mask),
    ):
        path = tmp_path / f"x.{kind}"
        picture.save(path, exif=b"Exif\0\0" + exif)
        assert read(path, 32, 48, *([1] if kind == "jpg" else []))[1] == size


def test_a_large_photograph_is_read_the_same_turned_or_not(tmp_path):
    """A JPEG is decoded at a fraction of its size; not at less than it is shrunk to, whichever way it is turned."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1600, 2400), np.uint8)).resize((1600, 2400))
    upright.save(tmp_path / "upright.jpg", quality=95)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=orientation(6))
    one, other = (read_image(tmp_path / f"{name}.jpg", 192, 240, 1)[0] for name in ("upright", "turned"))
    assert np.abs(one.astype(float) - other).mean() < 1


# -------------------------------------------------------------------------------------------------------- predict.py


@pytest.fixture
def run(unet_weights, tmp_path, monkeypatch, capsys):
    """Run predict.py in tmp_path on arguments: (exit code, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--weights", str(unet_weights), "--out", "out", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run_command(predict.main)
        return stopped.value.code or 0, capsys.readouterr().err.splitlines()

    return run


def test_predict_names_each_bad_picture_in_a_line_and_does_the_good_ones(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name, write in {**BAD, "a.png": GREY.save, ".b.png": GREY.save}.items():
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "half_plain.png").write_bytes(b"")
    names = [name for name in os.listdir("in") if predict.Path(name).suffix in predict.SUFFIXES and name[0] != "."]
    stems = [predict.Path(name).stem for name in names]
    for name in {name for name in names if stems.count(predict.Path(name).stem) > 1}:
        os.rename(f"in/{name}", f"in/{name.replace('.', '_')}{predict.Path(name).suffix}")
    bad = [name for name in sorted(os.listdir("in")) if name not in ("a.png", ".b.png", "folder.png")]
    bad = [name for name in bad if predict.Path(name).suffix in predict.SUFFIXES]
    code, errors = run("in", "--overlay")
    errors = [line for line in errors if line.startswith("error: ")]  # libtiff has a line of its own
    assert code == 2
    assert len(errors) == len(bad) > 20
    for name, error in zip(bad, errors):
        shown = name.replace("\n", r"\n").replace("\x1b", r"\x1b")
        assert error.startswith(f"error: in/{shown}: ")
    assert os.listdir("out/overlay") == ["a_overlay.png"]
    assert sorted(os.listdir("out")) == ["a_segmentation.png", "overlay"]


def test_predict_gives_every_unusual_picture_its_mask_and_its_overlay(run, tmp_path):
    (tmp_path / "in").mkdir()
    kinds = {name.replace(".", "_") + os.path.splitext(name)[1]: write for name, write in GOOD.items()}
    for name, write in kinds.items():
        write(tmp_path / "in" / name)
    files = [str(path) for path in sorted((tmp_path / "in").iterdir())]  # by name: .gif is not looked for in a folder
    assert run(*files, "--overlay") == (0, [])
    for path in files:
        stem = predict.Path(path).stem
        with Image.open(f"out/{stem}_segmentation.png") as mask, Image.open(f"out/overlay/{stem}_overlay.png") as over:
            assert mask.size == over.size == (WIDTH, HEIGHT)
            seen = (np.array(over) != (0, 255, 255)).any(-1)
            assert np.abs(np.array(over).astype(int) - LEVEL[..., None])[seen].max() <= 8, stem


NAMES = (
    "with space",
    "-dash",
    "läsion_病",
    "line\nbreak",
    "quote'\"",
    "two.dots",
    "100%_{x}",
    "a,b;c",
    "\udcff",
    "~",
    "$HOME",
)


def test_any_name_is_a_name(run, tmp_path):
    for name in NAMES:
        GREY.save(tmp_path / f"{name}.png")
    assert run("--uncertainty", "--passes", "1", "--", *(f"{name}.png" for name in NAMES)) == (0, [])
    for name in NAMES:
        assert (tmp_path / "out" / f"{name}_segmentation.png").exists()
        assert (tmp_path / "out" / "uncertainty" / f"{name}_uncertainty.png").exists()
    assert [row["name"] for row in read_csv("out/uncertainty/scores.csv")] == list(NAMES)


def test_paths_with_dots_and_links_and_other_sizes(run, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    GREY.save("in/a.png")
    GREY.resize((1, 1)).save("in/dot.png")
    GREY.resize((9000, 1)).save("in/line.png")
    (tmp_path / "in" / "link.png").symlink_to("a.png")
    (tmp_path / "linked").symlink_to("in")
    assert run("in/deep/../../linked/../in/./") == (0, [])
    sizes = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as mask:
            sizes[path.name.split("_")[0]] = mask.size
    assert sizes == {"a": (64, 48), "dot": (1, 1), "line": (9000, 1), "link": (64, 48)}


@pytest.mark.parametrize("name", ["nowhere.png", "loop.png", "pipe.png", "device.png", "folder.png/x.png"])
def test_predict_refuses_a_file_that_is_none(run, tmp_path, name):
    for made in "nowhere.png", "loop.png", "pipe.png", "device.png", "folder.png":
        BAD[made](tmp_path / made)
    code, errors = run(name)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"error: {name}: ")
    assert not (tmp_path / "out").exists()


def test_a_name_too_long_for_its_mask_is_named(run, tmp_path):
    name = 240 * "x"
    GREY.save(tmp_path / f"{name}.png")
    code, errors = run(f"{name}.png")
    assert (code, len(errors)) == (2, 1)
    assert f"{name}_segmentation.png cannot be read or written: File name too long" in errors[0]


def test_ten_thousand_files_in_a_folder(run, tmp_path):
    (tmp_path / "in").mkdir()
    GREY.save("in/a.png")
    for n in range(10_000):
        (tmp_path / "in" / f"{n}.txt").touch()
        os.link("in/a.png", f"in/{n}_segmentation.png")
    assert run("in") == (0, [])
    assert os.listdir("out") == ["a_segmentation.png"]
    for n in range(10_000):
        os.rename(f"in/{n}_segmentation.png", f"in/{n}.png")
    assert len(predict.find_images(["in"])) == 10_001


# ----------------------------------------------------------------------------------------------------------- data.py


def test_data_isic_names_a_bad_picture_whatever_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, masks = "isic/ISIC-2017_Training_Data", "isic/ISIC-2017_Training_Part1_GroundTruth"
    for folder in images, masks:
        os.makedirs(folder)
    image, mask = tmp_path / images / "ISIC_0000001.jpg", tmp_path / masks / "ISIC_0000001_segmentation.png"
    for name, write in BAD.items():
        for spoiled, good in ((image, mask), (mask, image)):
            Image.fromarray(LESION).save(good, "PNG")
            spoiled.unlink(missing_ok=True)
            made = tmp_path / name
            write(made)
            os.rename(made, spoiled)
            monkeypatch.setattr(sys, "argv", ["data.py", "isic", "isic", "x.h5", "--height", "32", "--width", "48"])
            with pytest.raises(SystemExit) as stopped:
                run_command(data.main)
            error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            assert (stopped.value.code, len(error)) == (2, 1), name
            assert error[0].startswith(f"error: {spoiled.relative_to(tmp_path)}: "), name
            os.rmdir(spoiled) if name == "folder.png" else os.unlink(spoiled)
    assert os.listdir(tmp_path) == ["isic"]
