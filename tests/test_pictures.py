"""Pictures of every kind, for predict.py and data.py: each is read correctly or rejected with one sentence."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

import data
import pictures
import predict
from pictures import SUFFIXES, inverted_warning, mask_cover, open_mask, read_image, read_mask
from utils import UserError, read_csv, run_command

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as pictures.py does for its users
HEIGHT, WIDTH = 48, 64
LEVEL = np.linspace(20, 235, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round().astype(np.uint8)  # lighter row by row


def png(width, height, depth=8, color=0, rows=b"", extra=b""):
    """The bytes of a PNG file, made by hand because Pillow writes neither 16-bit colour nor wrong sizes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_rows(channels):
    """LEVEL as 16-bit rows of a PNG file, with noise in the low byte."""
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
# Pictures that look like LEVEL: a file name to a function that writes the file.
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
    """JPEG blurs, which would move the outline."""
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
    """Runs in its own process, to measure memory and stderr. 3,600 megapixels; 100, at which Pillow would warn; 30, the
    largest in the challenge."""
    (tmp_path / "bomb.png").write_bytes(BOMB)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("L", (6748, 4499), 99).save(tmp_path / "real.jpg")
    # An orientation stored as text; a tag count that is too high.
    COLOR.save(tmp_path / "odd_turn.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0")
    COLOR.save(tmp_path / "odd_tags.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0" * 9)
    paths = [tmp_path / name for name in ("bomb.png", "large.png", "real.jpg", "odd_turn.jpg", "odd_tags.jpg")]
    done = subprocess.run([sys.executable, "-c", BOMBS, ROOT, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    assert [size for size, _ in found] == ["refused", "10000 10000", "4499 6748", "48 64", "48 64"]
    assert int(found[0][1]) < 20_000  # kB


TURNED = struct.pack("<HHLL", 0x0112, 3, 1, 6)  # an entry of EXIF: tag, type, count, value
# Pillow's `exif_transpose` fails on these: a truncated header, text instead of a fraction.
ODD_EXIF = {
    "header": (b"II*\0", (48, 64)),
    "fraction": (b"II*\0\x08\0\0\0\x02\0" + TURNED + struct.pack("<HHLLL", 0x011A, 2, 2, 0x36, 0), (64, 48)),
}


@pytest.mark.parametrize("name", ODD_EXIF)
def test_damaged_exif_does_not_prevent_reading(tmp_path, name):
    exif, size = ODD_EXIF[name]
    for kind, picture, read in (
        ("jpg", COLOR, read_image),
        ("png", INVERTED.point(lambda v: 255 * (v > 99)), read_mask),
    ):
        path = tmp_path / f"x.{kind}"
        picture.save(path, exif=b"Exif\0\0" + exif)
        assert read(path, 32, 48, *([1] if kind == "jpg" else []))[1] == size


def test_a_large_photograph_is_read_the_same_turned_or_not(tmp_path):
    """A JPEG is decoded at a fraction of its size, but never below the final size, in any orientation."""
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
    names = [name for name in os.listdir("in") if predict.Path(name).suffix in SUFFIXES and name[0] != "."]
    stems = [predict.Path(name).stem for name in names]
    for name in {name for name in names if stems.count(predict.Path(name).stem) > 1}:
        os.rename(f"in/{name}", f"in/{name.replace('.', '_')}{predict.Path(name).suffix}")
    bad = [name for name in sorted(os.listdir("in")) if name not in ("a.png", ".b.png", "folder.png")]
    bad = [name for name in bad if predict.Path(name).suffix in SUFFIXES]
    code, errors = run("in", "--overlay")
    errors = [line for line in errors if line.startswith("error: ")]  # libtiff prints a line too
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
    files = [str(path) for path in sorted((tmp_path / "in").iterdir())]
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


def test_any_file_name_is_accepted(run, tmp_path):
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
def test_predict_refuses_what_is_not_a_regular_file(run, tmp_path, name):
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
    assert len(predict.find_images(["in"])[0]) == 10_001


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


# ------------------------------------------------------------------------------------------- labels that are not a mask


ROWS, COLUMNS = np.indices((96, 128))
DISC = (ROWS - 48) ** 2 + (COLUMNS - 60) ** 2 < 30**2
RIM = binary_dilation(DISC, iterations=3) & ~binary_erosion(DISC, iterations=3)
RULER = ROWS > 85


def voc(pixels):
    """A palette picture with the colours of Pascal VOC: black, dark red, green, and cream for index 255."""
    picture = Image.fromarray(pixels.astype(np.uint8), "P")
    colors = np.zeros((256, 3), np.uint8)
    colors[[1, 2, 255]] = (128, 0, 0), (0, 128, 0), (224, 224, 192)
    picture.putpalette(colors.tobytes())
    return picture


def grey(pixels, kind=np.uint8):
    return Image.fromarray(pixels.astype(kind))


LABELS = {  # what is saved, and the values that the message names
    "ignored rim.png": (grey(np.where(RIM, 255, DISC)), "3 values: 0, 1, 255;"),
    "ignored corner.png": (grey(np.where(RULER & (COLUMNS < 9), 255, DISC)), "3 values: 0, 1, 255;"),
    "ruler.png": (grey(DISC + 2 * RULER), "3 values: 0, 1, 2;"),
    "thin ruler.png": (grey(255 * DISC + 100 * (ROWS == 90)), "3 values: 0, 100, 255;"),
    "without black.png": (grey(1 + DISC), "2 values: 1, 2;"),
    "two greys.bmp": (grey(50 + 150 * DISC), "2 values: 50, 200;"),
    "dark label.png": (grey(250 * DISC + 3 * RULER), "3 values: 0, 3, 250;"),
    "grey rim.png": (grey(np.where(RIM, 128, 255 * DISC)), "3 values: 0, 128, 255;"),
    "many labels.gif": (grey(ROWS // 10), "10 values: 0, 1, 2, 3, 4, 5, ...;"),
    "void.png": (voc(np.where(RIM, 255, DISC)), "3 colours: (0, 0, 0), (128, 0, 0), (224, 224, 192);"),
    "two classes.png": (voc(DISC + 2 * RULER), "3 colours: (0, 0, 0), (0, 128, 0), (128, 0, 0);"),
    "no black.png": (voc(np.where(DISC, 1, 255)), "2 colours: (128, 0, 0), (224, 224, 192);"),
    "16 bits.png": (grey(DISC + 2 * RULER, np.uint16), "3 values: 0, 1, 2;"),
    "16 bits rim.tif": (grey(np.where(RIM, 65535, DISC), np.uint16), "3 values: 0, 1, 65535;"),
    "32 bits.tif": (grey(np.where(RIM, 255, DISC), np.int32), "3 values: 0, 1, 255;"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_not_a_mask_are_refused_with_their_values(tmp_path, name):
    picture, found = LABELS[name]
    picture.save(tmp_path / name)
    with pytest.raises(UserError) as refusal:
        open_mask(tmp_path / name)
    assert str(refusal.value).startswith(f"{tmp_path / name}: not a mask, it has {found} save it with two")


LARGE = grey(255 * np.kron(DISC, np.ones((4, 4))))
INTERPOLATED = {
    "half.png": (LARGE.resize((256, 192), Image.Resampling.BILINEAR), 2),
    "third.png": (LARGE.resize((171, 128), Image.Resampling.BICUBIC), 4 / 3),
    "lanczos.png": (LARGE.resize((256, 192), Image.Resampling.LANCZOS), 2),
    "boxes.png": (LARGE.resize((200, 150), Image.Resampling.BOX), 200 / 128),
    "turned.png": (LARGE.rotate(30, Image.Resampling.BICUBIC, center=(242, 194)), 4),
    "larger.png": (grey(255 * DISC).resize((640, 480), Image.Resampling.BICUBIC), 5),
    "dim.png": (LARGE.resize((640, 480), Image.Resampling.BILINEAR).point(lambda v: v * 100 // 255), 5),
}


@pytest.mark.parametrize("name", INTERPOLATED)
def test_a_mask_with_the_grey_of_an_interpolated_edge_is_read(tmp_path, name):
    picture, scale = INTERPOLATED[name]
    assert len(np.unique(picture)) > 2
    picture.save(tmp_path / name)
    read = np.asarray(open_mask(tmp_path / name))
    assert set(np.unique(read)) == {0, 255}
    assert np.mean(read == 255) == pytest.approx(DISC.mean(), rel=0.02)
    rows, columns = np.nonzero(read)
    assert np.array([rows.mean(), columns.mean()]) / scale == pytest.approx([48, 60], abs=0.6)


def layer(color, alpha):
    return Image.merge("RGBA", [*(Image.new("L", (128, 96), c) for c in color), grey(alpha)])


@pytest.mark.parametrize(
    "painted",
    [layer((0, 0, 0), 255 * DISC), layer((0, 0, 0), 200 * DISC), layer((0, 0, 0), 255 * DISC).convert("LA")],
    ids=["opaque", "half", "grey"],
)
def test_black_paint_on_a_transparent_layer_is_explained(tmp_path, painted):
    painted.save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: all that is painted is black.*; paint the lesion white"):
        open_mask(tmp_path / "x.png")


def test_black_paint_beside_a_transparent_colour_is_explained(tmp_path):
    grey(INVERSE).save(tmp_path / "x.png", transparency=255)
    with pytest.raises(UserError, match=r"x\.png: all that is painted is black"):
        open_mask(tmp_path / "x.png")


# -------------------------------------------------------------------------------------- inverted masks, orientations


INVERSE = 255 * ~DISC
INVERTED_MASKS = {
    "white skin.png": grey(INVERSE),
    "all white.png": grey(255 + 0 * INVERSE),
    "erased.png": layer((255, 255, 255), INVERSE),
    "on painted skin.png": Image.merge("RGB", [grey(200 * ~DISC), grey(120 * ~DISC), grey(90 * ~DISC)]),
}


@pytest.mark.parametrize("name", INVERTED_MASKS)
def test_an_inverted_mask_is_noticed_by_its_corners(tmp_path, name):
    INVERTED_MASKS[name].save(tmp_path / name)
    cover = mask_cover(np.asarray(open_mask(tmp_path / name)))
    warning = inverted_warning([("x.png", *cover)])
    assert warning.startswith("1 of 1 masks cover all four corners of their picture (x.png): is the lesion")
    covers = [("a", False, 0.2), ("b", *cover), ("c", *cover)]
    assert inverted_warning(covers).startswith("2 of 3 masks cover all four corners of their picture (b, c): ")


def test_a_tiff_in_which_white_is_zero_is_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", DISC, photometric="miniswhite")
    assert inverted_warning([("x.tif", *mask_cover(np.asarray(open_mask(tmp_path / "x.tif"))))])


def test_large_masks_are_named_only_if_they_are_many():
    large, small = ("large", False, 0.6), ("small", False, 0.3)
    warning = inverted_warning([large, large, small, small])
    assert warning.startswith("2 of 4 masks cover over half of their picture (large, large): ")
    assert inverted_warning([large, small, small, small]) is None  # not more than a quarter
    assert inverted_warning([large, large, large]) is None  # fewer than four
    assert inverted_warning([("half", False, 0.5)] * 8) is None
    assert inverted_warning([]) is None


@pytest.mark.parametrize("number", range(2, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_the_other_way_is_what_a_program_without_exif_shows(tmp_path, number, kind):
    square = grey(np.arange(60 * 60).reshape(60, 60) % 251)
    square.save(tmp_path / f"x.{kind}", exif=orientation(number), **({"quality": 100} if kind == "jpg" else {}))
    with pictures.open_picture(tmp_path / f"x.{kind}") as picture:
        found = pictures.orientation(picture)
        upright = np.asarray(pictures.upright(picture))
    assert found == number
    assert not pictures.size_tells(found, (60, 60))
    assert pictures.size_tells(found, (60, 61)) == (number > 4)
    assert np.abs(pictures.other_way(np.asarray(square), found).astype(int) - upright).max() <= 3


# --------------------------------------------------------------------------------------------------- files of a folder


def fill(folder, names):
    """Write files: pictures by Pillow's format, or bytes."""
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            COLOR.save(folder / name, content)


HEIC, DICOM = b"\0\0\0\x18ftypheic" + bytes(200), bytes(128) + b"DICM" + bytes(100)


def test_pictures_are_listed_by_suffix_or_content_and_the_rest_is_named(tmp_path):
    read = {"a.JPE": "JPEG", "b.jfif": "JPEG", "c.gif": "GIF", "d.jp2": "JPEG2000", "e.dib": "BMP", "f.pnm": "PPM"}
    read |= {"g.xyz": "PNG", "h": "JPEG", "i.001": "TIFF", "broken.jpg": b"text"}
    left = {"p.HEIC": HEIC, "q": HEIC, "r": DICOM, "s.dcm": b"?", "t.NEF": "TIFF", "u.txt": b"notes"}
    ignored = {".x.jpg": "JPEG", "y.png~": "PNG", "y.png.bak": "PNG", "z.jpg.part": "JPEG", "Thumbs.db": b"?"}
    ignored |= {f"{name}/x.jpg": "JPEG" for name in ("@eaDir", "#recycle", "lost+found", "__MACOSX", ".git")}
    fill(tmp_path, {**read, **left, **ignored, "old/x.jpg": "JPEG"})
    found, left_out = pictures.list_images(tmp_path)
    assert [os.path.basename(path) for _, path in found] == sorted(read)
    assert [name for name, _ in found] == [name.partition(".")[0] for name in sorted(read)]
    assert sorted(os.path.basename(path) for path, _ in left_out) == sorted([*left, "old"])
    line = pictures.left_out_line(left_out)
    assert line.startswith("left out: 6 files (p.HEIC, q, r, s.dcm, t.NEF, ...), 1 folder (old); export HEIC, DICOM")
    assert "--recursive" in line


def test_subfolders_are_read_with_their_names(tmp_path):
    fill(tmp_path, dict.fromkeys(("a.jpg", "s/a.jpg", "s/t/b.png", "@eaDir/c.jpg", "out/d.jpg"), "JPEG"))
    (tmp_path / "s" / "circle").symlink_to(tmp_path)
    found, left_out = pictures.list_images(tmp_path, recursive=True, without=[tmp_path / "out"])
    assert [name for name, _ in found] == ["a", "s__a", "s__t__b"]
    assert pictures.left_out_line(left_out) == "left out: 1 folder (circle); links to folders are not followed"
    fill(tmp_path, {"s__a.png": "PNG"})
    with pytest.raises(UserError, match=r"s/a\.jpg and .*s__a\.png have the same id, s__a"):
        pictures.one_of_each(pictures.list_images(tmp_path, recursive=True)[0])


def test_masks_of_any_format_without_losses_are_matched(tmp_path):
    (tmp_path / "m").mkdir()
    names = ["a.PNG", "B_Segmentation.bmp", "c_SEGMENTATION.gif", "d.tif", "e.pgm", "f.webp", "g", "h.png", "h.jpg"]
    kinds = ["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "PNG", "PNG", "JPEG"]
    for name, kind in zip(names, kinds):
        grey(255 * DISC).save(tmp_path / "m" / name, kind, **({"lossless": True} if kind == "WEBP" else {}))
    for name in "h.json", "h.xcf", "h.png~":
        (tmp_path / "m" / name).write_text("{}")
    grey(255 * DISC).save(tmp_path / "m" / "i.webp", quality=80)
    grey(255 * DISC).save(tmp_path / "m" / "j.jpg")
    masks, alone, left_out = pictures.match_masks(tmp_path / "m", {name: f"{name}.jpg" for name in "abcdefghij"})
    assert {name: os.path.basename(path) for name, path in masks.items()} == dict(zip("abcdefgh", names))
    assert alone == []
    assert sorted((os.path.basename(path), reason) for path, reason in left_out) == [
        ("h.json", "other"),
        ("h.xcf", "other"),
        ("i.webp", "lossy"),
        ("j.jpg", "lossy"),
    ]
    for name in names[:7]:
        np.testing.assert_array_equal(np.asarray(open_mask(tmp_path / "m" / name)), 255 * DISC)
    with pytest.raises(UserError, match=r"i\.webp: a lossy WebP blurs"):
        open_mask(tmp_path / "m" / "i.webp")


def test_an_ambiguous_mask_is_refused(tmp_path):
    fill(tmp_path, {"a.png": "PNG", "A_segmentation.bmp": "BMP"})
    with pytest.raises(UserError, match=r"A_segmentation\.bmp and .*a\.png are both masks of x/a\.jpg"):
        pictures.match_masks(tmp_path, {"a": "x/a.jpg"})
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"A_segmentation\.bmp fits both x/a\.jpg and x/A\.jpg"):
        pictures.match_masks(tmp_path, {"a": "x/a.jpg", "A": "x/A.jpg"})
