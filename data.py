"""ISIC 2017 folders, any folder of images, or synthetic lesions to one HDF5 file; reading that file; the split.

python data.py isic isic2017 datasets/isic2017.h5               # 192x240, one grey channel, as in the paper
python data.py folder photos datasets/photos.h5 --masks masks   # your own images, with masks for some, all or none
python data.py synthetic datasets/synthetic.h5 --images 280     # lesions drawn by the program, no download
python data.py info datasets/isic2017.h5
python data.py show datasets/isic2017.h5 sheet.png
"""

import argparse
import contextlib
import logging
import os
import re
import shutil
import struct
import warnings
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from matplotlib.figure import Figure
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import fft, ndimage

from utils import (
    LARGEST_SIDE,
    UserError,
    composed,
    in_one_line,
    map_in_order,
    reserve,
    run_command,
    track,
    whole_file,
)

LAYOUT_VERSION = 2
PARTS = {"train": "Training", "validation": "Validation", "test": "Test_v2"}  # ours: the challenge's
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
NOT_AN_IMAGE = ("_superpixels", "_segmentation")  # what ISIC's folders hold beside the images
SPLIT_SEED = 2017
SHEET = 1000  # images on a contact sheet, which is 30 pixels high for each
# Two pictures of one lesion each: on one side of any split.
NEAR_DUPLICATES = [
    ("ISIC_0012290", "ISIC_0013594"),
    ("ISIC_0012672", "ISIC_0012673"),
    ("ISIC_0012756", "ISIC_0013184"),
]
# The kinds of picture that are read, whatever their names: Pillow knows others, some of which start a program.
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# What Pillow raises on a bad file.
UNREADABLE = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError)
UNREADABLE += (struct.error, Image.DecompressionBombError)
# How to turn a picture by its orientation in EXIF.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A picture is read or refused: what Pillow wonders about beside that, its size or its tags, helps nobody.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


# ------------------------------------------------------------------------------------------- the folders of pictures


class Pair(NamedTuple):
    id: str
    part: str
    image: str  # the paths: 100,000 Path objects would take more memory than all else
    mask: str  # "": none


def find_pairs(source):
    """The image and the mask of every id in the ISIC 2017 folders below `source`: a list of Pair, by part and id.

    Folders may lie one level deeper, as the zips unpack. Raises UserError for what is missing or there twice.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder; give the one that holds ISIC-2017_Training_Data")
    pairs = []
    for part, name in PARTS.items():
        images = _files_by_id(source, f"ISIC-2017_{name}_Data", r"(ISIC_\d+)\.jpe?g")
        masks = _files_by_id(source, f"ISIC-2017_{name}_Part1_GroundTruth", r"(ISIC_\d+)_segmentation\.png")
        if part == "train" and not images:
            raise UserError(f"{source}: no ISIC_*.jpg in a folder ISIC-2017_Training_Data here or one level deeper")
        for these, others, kind in ((images, masks, "mask"), (masks, images, "image")):
            alone = sorted(these.keys() - others.keys())
            if alone:
                raise UserError(
                    f"{these[alone[0]]} has no {kind} ({len(alone)} such files): unpack the {name} images and their "
                    "Part1_GroundTruth, both whole, or remove the file"
                )
        pairs += [Pair(id, part, images[id], masks[id]) for id in sorted(images)]
    (id, count), *_ = Counter(pair.id for pair in pairs).most_common(1)
    if count > 1:
        raise UserError(f"{id} is in two parts of the challenge's data: remove it from one")
    return pairs


def _files_by_id(source, folder, pattern):
    files = []
    for found in sorted([*source.glob(folder), *source.glob(f"*/{folder}")]):
        for name in sorted(os.listdir(found)) if found.is_dir() else []:
            if match := re.fullmatch(pattern, name, re.IGNORECASE):
                files.append((match[1].upper(), os.path.join(found, name)))
    return _one_of_each(files)


def _one_of_each(files):
    """A dict of the (id, path) in `files`. Raises UserError if an id is there twice."""
    found = {}
    for id, path in files:
        if id in found:
            raise UserError(f"{found[id]} and {path} are both for {id}: remove one of them")
        found[id] = path
    return found


def find_folder(images, masks=None):
    """The images in any folder, and the masks in the folder `masks` of some, all or none: a list of Pair, by id.

    An id is the image's name without its suffix; the mask is ID.png or ID_segmentation.png, the latter alone if the
    two folders are one. Raises UserError for a mask without an image, and for two files of one id.
    """
    pictures = _one_of_each(
        (stem, path)
        for stem, suffix, path in _list_files(images)
        if suffix in SUFFIXES and not stem.lower().endswith(NOT_AN_IMAGE)
    )
    if not pictures:
        raise UserError(f"{images}: no image in this folder ({' '.join(sorted(SUFFIXES))})")
    of_images = masks and os.path.isdir(masks) and os.path.samefile(images, masks)
    drawn = _one_of_each(
        (re.sub("_segmentation$", "", stem, flags=re.IGNORECASE), path)
        for stem, suffix, path in (_list_files(masks) if masks else [])
        if suffix == ".png" and (stem.lower().endswith("_segmentation") or not of_images)
    )
    if alone := sorted(drawn.keys() - pictures.keys()):
        raise UserError(f"{drawn[alone[0]]} has no image ({len(alone)} such files): add the image or remove the mask")
    return [Pair(id, "train", pictures[id], drawn.get(id, "")) for id in sorted(pictures)]


def _list_files(folder):
    """(name without suffix, suffix in lower case, path) of what is in the folder and not hidden, by name."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: {'no folder' if os.path.exists(folder) else 'there is no such folder'}")
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if name.startswith("."):
            continue
        if re.search("[\0-\x1f\ud800-\udfff]", name):
            raise UserError(f"{folder}: the name {name!a} is not UTF-8 or has a control character; rename the file")
        yield composed(stem), suffix.lower(), os.path.join(folder, name)


@contextlib.contextmanager
def open_picture(path, file=None):
    """A picture as Pillow opens it, for a block that decodes it; of several pages or frames the first.

    Raises UserError if the file is missing, is none (a folder, a pipe), claims more than 178 megapixels, is no picture,
    or is damaged, which may show in the block only. file: what to read if it is not `path` itself, a file object."""
    try:
        if not file and not os.path.isfile(path):  # the system's pipes and devices may never end
            raise UserError(f"{path}: there is no such file" + " but a folder or a pipe" * os.path.exists(path))
        # By its name Pillow maps a TIFF that is not compressed, and one that is to be turned it maps wrongly.
        with file or open(path, "rb") as opened, Image.open(opened, formats=FORMATS) as picture:
            yield picture
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable picture, or of an unknown kind; get it again, or export it as PNG")
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture ({error}); get or export it again")


def _orientation(picture):
    """How the picture is to be turned, a number of EXIF's; if that is damaged, the pixels need not be."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return None


def upright(picture):
    """The picture of `open_picture` as it is to be displayed.

    Pillow's own `exif_transpose` writes all of EXIF anew, and fails where that is odd."""
    picture.load()  # which turns a TIFF, and removes its orientation
    turn = TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def read_image(path, height, width, channels):
    """One picture at the network's size: (uint8 (height, width, channels), its original (height, width)).

    One channel is the luminance. The aspect ratio is not kept, as in the paper; down-sampling is anti-aliased.
    Raises UserError if the file is no 8-bit picture or is damaged.
    """
    mode = "L" if channels == 1 else "RGB"
    with open_picture(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise UserError(f"{path}: more than 8 bits per channel; save it with 8")
        if picture.format == "TIFF":
            picture.load()  # Pillow has given the turned size since it opened it, but turns it only now
        turned = _orientation(picture) in (5, 6, 7, 8)
        original = picture.size if turned else picture.size[::-1]  # as displayed: (height, width)
        # A JPEG decodes at 1/2, 1/4 or 1/8 of its size, in grey if asked: far less work, the same result.
        picture.draft(mode, (height, width) if turned else (width, height))
        picture = upright(picture)
        picture = picture.convert("RGBA") if "transparency" in picture.info else picture  # else Pillow warns
        pixels = np.asarray(picture.convert(mode).resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, channels), original


def open_mask(path, file=None):
    """One mask at its own size, as displayed: a Pillow image of mode L in which skin is 0 and lesion 255.

    Transparent pixels are skin; where there are two colours and one is black, the other one is lesion; else grey
    values at edges are rounded. Raises UserError if the mask is unreadable or not two-valued.
    file: what to read if it is not `path` itself, a file object.
    """
    with open_picture(path, file) as picture:
        if picture.format in ("JPEG", "MPO", "JPEG2000"):
            raise UserError(f"{path}: a JPEG blurs a mask's outline; save the mask as PNG")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path}: {picture.n_frames} pages; save the mask as one picture without layers")
        picture = upright(picture)
        picture = picture if picture.mode == "L" else _in_grey(picture)  # which would copy many megapixels
    counts = np.array(picture.histogram())
    (values,) = np.nonzero(counts)
    of_two = values[-1] == 1 or (len(values) == 2 and values[0] == 0)
    grey = 0 if of_two else counts[16:240].sum() / counts.sum()
    if grey > 0.02:
        raise UserError(f"{path}: not a mask, {grey:.0%} of it is neither black nor white; save it as 0 and 255")
    if set(values) - {0, 255}:
        threshold = 0 if of_two else 128  # where the challenge's scorer cuts
        picture = picture.point([255 * (value > threshold) for value in range(256)])
    return picture


def _in_grey(picture):
    """The picture of any mode in mode L; of two colours of which one is black, the other becomes white."""
    if picture.mode.startswith(("I", "F")):  # which Pillow would clip at 255
        pixels = np.asarray(picture)
        values = np.unique(pixels)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            raise ValueError("more than 8 bits per pixel, and more than black and one other value")
        return Image.fromarray(255 * (pixels > 0).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA"))
    picture = picture.convert("RGB")
    colors = [color for _, color in picture.getcolors(2) or []]
    if len(colors) == 2 and (0, 0, 0) in colors:
        picture = picture.point(3 * [0, *255 * [255]])
    return picture.convert("L")


def shrink_mask(picture, height, width):
    """A mask of `open_mask` at the network's size: uint8 0/1 (height, width)."""
    # Averaging blocks of pixels first: a mask of many megapixels would take longer to resize than to read.
    small = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3)
    return (np.asarray(small) > 127).astype(np.uint8)


def read_mask(path, height, width):
    """One mask at the network's size: (uint8 0/1 (height, width), its original (height, width)).

    Raises UserError as `open_mask` does, and if the mask is empty.
    """
    picture = open_mask(path)
    small = shrink_mask(picture, height, width)
    if not small.any():
        raise UserError(f"{path}: the mask is empty at {height}x{width}; draw the lesion or remove the pair")
    return small, picture.size[::-1]


def read_pair(pair, height, width, channels):
    """Image and mask, if there is one, of a Pair as a row for `write_dataset`; UserError if their aspects differ by
    over 2 %."""
    image, (rows, columns) = read_image(pair.image, height, width, channels)
    if not pair.mask:
        return Row(pair.id, pair.part, (rows, columns), image, None, pair.image)
    mask, (mask_rows, mask_columns) = read_mask(pair.mask, height, width)
    if abs(mask_columns * rows / (mask_rows * columns) - 1) > 0.02:
        raise UserError(
            f"{pair.mask} is {mask_rows}x{mask_columns} and its image {rows}x{columns} rows x columns: "
            "not the same picture; get or draw the mask again"
        )
    return Row(pair.id, pair.part, (rows, columns), image, mask, pair.image)


# ------------------------------------------------------------------------------------------------- synthetic lesions

# Light falls as exp(-density * absorbance) through a pigment, so one density range suits every skin tone.
BROWN = np.array([0.50, 0.95, 1.20], "f4")
BLACK, BLUE, RED, PALE = np.array([[1.7, 1.8, 1.9], [1.3, 1.0, 0.7], [0.2, 0.9, 0.8], [0.1, 0.3, 0.3]], "f4")
LIGHT_SKIN, DARK_SKIN, HAIR = np.array([[238, 200, 186], [112, 74, 60], [60, 42, 35]], "f4")
STICKERS = np.array([[40, 90, 190], [240, 200, 50], [60, 150, 90], [225, 120, 50], [120, 60, 140]], "f4")
FAINT_SHARE = 0.13


def smooth_noise(rng, height, width, decay):
    """Noise of mean 0 and deviation 1 whose amplitude falls as frequency ** -decay."""
    frequency = min(height, width) * np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width))
    amplitude = (np.maximum(frequency, 1.0) ** -decay * (frequency > 0)).astype("f4")
    noise = fft.irfft2(fft.rfft2(rng.standard_normal((height, width), "f4")) * amplitude, (height, width))
    return noise / noise.std()


def disc(y, x, radius, softness):
    """Opacity of a round spot at the origin; lengths are fractions of the short side."""
    return np.clip(0.5 + (radius - np.hypot(y, x)) / softness, 0, 1)


def draw_mask(rng, y, x, hidden):
    """One irregular blob that covers 1 % to 60 % of the picture and avoids hidden pixels."""
    cy, cx = rng.normal(0, rng.choice([0.2, 0.45], p=[0.8, 0.2]), 2).clip(-0.8, 0.8) * [y.max(), x.max()]
    angles, order = np.linspace(-np.pi, np.pi, 256), np.arange(2, 9)[:, None]
    phase, weight = rng.uniform(0, 2 * np.pi, (7, 1)), rng.normal(0, rng.uniform(0.1, 0.55), (7, 1))
    outline = (weight / order**1.3 * np.cos(order * angles + phase)).sum(0)
    if rng.random() < 0.2:  # a notch, as where a lesion regresses
        outline -= rng.uniform(0.3, 0.7) * np.exp(-(((angles - rng.uniform(-2, 2)) / 0.25) ** 2))
    # In log radius the outline and its roughness keep their shape at any lesion size.
    level = np.log(np.hypot(y - cy, x - cx) + 1e-3) - np.interp(np.arctan2(y - cy, x - cx), angles, outline)
    level += rng.uniform(0.02, 0.1) * smooth_noise(rng, *y.shape, 1.4)
    level[hidden] = np.inf
    parts, _ = ndimage.label(level <= np.quantile(level, 0.012 + 0.58 * rng.beta(1.0, 2.5)))
    # Roughness may detach islets or open pinholes; annotators outline a single region.
    return ndimage.binary_fill_holes(parts == np.bincount(parts.ravel())[1:].argmax() + 1) & ~hidden


def pigment(rng, mask):
    """Optical density (height, width, 3) of a variegated lesion, from almost invisible to nearly black."""
    density = rng.uniform(0.02, 0.05) if rng.random() < FAINT_SHARE else 0.08 + 1.5 * rng.beta(1.2, 2.0)
    hue = BROWN * rng.uniform(0.85, 1.15, 3).astype("f4")
    for patch in rng.choice([BLACK, BLUE, RED, PALE], rng.integers(0, 4), p=[0.4, 0.2, 0.2, 0.2]):
        extent = 1 / (1 + np.exp(4 * (rng.uniform(0, 1) - smooth_noise(rng, *mask.shape, 1.9))))
        hue = hue + rng.uniform(0.4, 0.9) * extent[..., None] * (patch - hue)
    texture = np.exp(rng.uniform(0.1, 0.35) * smooth_noise(rng, *mask.shape, rng.uniform(0.9, 1.6)))
    # Only the look is softened: the mask stays the sharp outline that the pigment fades around.
    edge = ndimage.gaussian_filter(mask.astype("f4"), min(mask.shape) * rng.choice([0.006, 0.01, 0.025]))
    return (density * texture * edge)[..., None] * hue


def draw_hairs(rng, height, width):
    """Opacity of 0 to 39 thin curved hairs."""
    strokes, short = np.zeros((height, width), "f4"), min(height, width)
    t = np.linspace(0, 1, 2 * short)[:, None]
    for _ in range(rng.choice([0, rng.integers(1, 8), rng.integers(8, 40)], p=[0.45, 0.35, 0.2])):
        heading = rng.uniform(0, 2 * np.pi) + np.array([0, rng.normal(0, 0.4)])
        first, last = rng.uniform(0.2, 0.6) * short * np.stack([np.sin(heading), np.cos(heading)], axis=1)
        path = rng.uniform(-0.1, 1.1, 2) * [height, width] + 2 * t * first + t**2 * (last - first)
        rows, columns = path[((path >= 0) & (path < [height, width])).all(1)].astype(int).T
        strokes[rows, columns] = 1
    thickness = max(0.45, short * rng.uniform(0.003, 0.006))
    return np.clip(2.5 * thickness * ndimage.gaussian_filter(strokes, thickness, truncate=3), 0, 1)


def draw_ruler(rng, image):
    """Darkens tick marks along one edge of the image, in place."""
    side, short = np.rot90(image, rng.integers(4)), min(image.shape[:2])
    thickness, margin = max(1, round(0.006 * short)), int(rng.uniform(0, 0.04) * short)
    for tick, at in enumerate(np.arange(0, side.shape[1], rng.uniform(0.035, 0.07) * short).astype(int)):
        length = int((0.05 if tick % 5 else 0.09) * short)
        side[margin : margin + length, at : at + thickness] *= 0.3


def draw_lesion(rng, height, width):
    """One dermoscopy-like image, uint8 (height, width, 3), with its exact mask, uint8 0/1 (height, width)."""
    y, x = np.indices((height, width), "f4") / min(height, width)
    y, x = y - y.mean(), x - x.mean()
    field, sticker = np.ones_like(y), np.zeros_like(y)
    if rng.random() < 0.25:  # dark corners of the dermatoscope
        field = disc(y, x, np.hypot(y.max(), x.max()) * rng.uniform(0.78, 0.93), 0.06)
    if rng.random() < 0.12:
        cy, cx = rng.choice([-1, 1], 2) * [y.max(), x.max()] * rng.uniform(0.75, 1)
        sticker = disc(y - cy, x - cx, rng.uniform(0.1, 0.25), 0.01)
    mask = draw_mask(rng, y, x, hidden=(field < 0.5) | (sticker > 0.5))
    skin = LIGHT_SKIN + rng.beta(1.0, 2.0) * (DARK_SKIN - LIGHT_SKIN) + rng.normal(0, 5, 3).astype("f4")
    redness = rng.uniform(0, 0.05) * smooth_noise(rng, height, width, 1.5)[..., None] * RED
    light = 1 + rng.normal(0, 0.1) * y + rng.normal(0, 0.1) * x - rng.uniform(0, 0.3) * (y**2 + x**2)
    image = skin * light[..., None] * np.exp(-redness - pigment(rng, mask))
    image += sticker[..., None] * (rng.choice(STICKERS) - image)
    if rng.random() < 0.25:
        draw_ruler(rng, image)
    image += 0.85 * draw_hairs(rng, height, width)[..., None] * (HAIR * rng.uniform(0.5, 1.5) - image)
    image *= 0.06 + 0.94 * field[..., None]
    image += rng.uniform(1, 4) * rng.standard_normal(image.shape, "f4")
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def draw_row(index, seed, height, width, channels):
    """Lesion number `index` of those that `seed` gives, whatever their number."""
    image, mask = draw_lesion(np.random.default_rng([seed, index]), height, width)
    if channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return Row(f"SYNTHETIC_{index:07d}", "train", (height, width), image, mask)


# ------------------------------------------------------------------------------------------------------ the HDF5 file


class Row(NamedTuple):
    id: str
    part: str
    original_size: tuple  # (height, width)
    image: np.ndarray  # uint8 (H, W, C)
    mask: np.ndarray  # uint8 0/1 (H, W); None: there is none
    file: str = ""  # the image's path


def write_dataset(out, rows, count, height, width, channels, source, force=False, folder=""):
    """Write `count` rows to the HDF5 file `out`, whole or not at all.

    `images` uint8 (N, H, W, C) and `masks` uint8 0/1 (N, H, W), a chunk per image, 0 where there is no mask;
    `has_mask` bool (N,); `ids`, `part`, `original_sizes` (height, width), `files`, the images' paths below the folder;
    attributes source, folder, height, width, channels, layout_version.
    Raises UserError if `out` exists (unless `force`), the size does not suit the network, or the disk is too small.
    """
    out = Path(out)
    check_output(out, force)
    if height % 16 or width % 16 or min(height, width) < 16 or max(height, width) > LARGEST_SIDE:
        raise UserError(
            f"--height {height} --width {width}: the network halves both four times; use multiples of 16, at most "
            f"{LARGEST_SIDE}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = count * (height * width * (channels + 1) + 1000) + 100_000  # 1 kB for ids, sizes and indices
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"{out.parent} has {free / 1e6:.1f} MB free and {out.name} needs {needed / 1e6:.1f} MB")
    with whole_file(out) as partial:
        reserve(partial, needed)
        with h5py.File(partial, "w", libver="v110") as file:  # its index of many chunks is small
            shape = (count, height, width, channels)
            images = file.create_dataset("images", shape, "uint8", chunks=(1, *shape[1:]))
            masks = file.create_dataset("masks", shape[:3], "uint8", chunks=(1, *shape[1:3]))
            text = {"ids": [], "part": [], "files": []}
            sizes, has_mask = np.empty((count, 2), "int32"), np.zeros(count, bool)
            for n, row in enumerate(track(rows, f"writing {out.name}", count)):
                images[n], sizes[n], has_mask[n] = row.image, row.original_size, row.mask is not None
                if has_mask[n]:
                    masks[n] = row.mask
                values = row.id, row.part, os.path.relpath(row.file, folder) if folder else ""
                for column, value in zip(text.values(), values):
                    column.append(value)
            for name, values in text.items():
                file.create_dataset(name, data=values, dtype=h5py.string_dtype())
            file.create_dataset("original_sizes", data=sizes)
            file.create_dataset("has_mask", data=has_mask)
            file.attrs.update(source=str(source), folder=folder and os.path.abspath(folder))
            file.attrs.update(height=height, width=width, channels=channels, layout_version=LAYOUT_VERSION)
        with Dataset(partial) as written:
            if len(set(written.ids)) < count or written.masks([count - 1]).any() != written.has_mask[-1]:
                raise UserError(f"{out}: what was written does not read back; check the disk and try again")


def check_output(path, force):
    """Raise UserError if the output file `path` exists, unless `force`; a folder is never replaced."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if Path(path).exists() and not force:
        raise UserError(f"{path} exists already; give another name, or --force to replace it")


class Dataset:
    """An HDF5 file of `write_dataset`, open for reading. Images are addressed by their position in the whole file.

    path, source, folder, height, width, channels; ids, part, files: str arrays (N,); has_mask: bool (N,);
    original_sizes: int (N, 2).
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: there is no such file")
        try:
            self._file = h5py.File(path)
            version = self._file.attrs["layout_version"]
            if version != LAYOUT_VERSION:
                raise UserError(f"{path}: layout version {version}, this program reads {LAYOUT_VERSION}; make it again")
            self.source, self.folder = self._file.attrs["source"], self._file.attrs["folder"]
            _, self.height, self.width, self.channels = self._file["images"].shape
            self.ids, self.part, self.files = (self._file[name].asstr()[:] for name in ("ids", "part", "files"))
            self.original_sizes = self._file["original_sizes"][:]
            self.has_mask = self._file["has_mask"][:]
            self._check()
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error)

    def _check(self):
        """Raise UserError if the file's parts do not fit together."""
        count, size = len(self.ids), (self.height, self.width)
        images, masks = self._file["images"], self._file["masks"]
        if not count or images.shape != (count, *size, self.channels) or masks.shape != (count, *size):
            raise self._damaged(f"{count} ids, images {images.shape}, masks {masks.shape}")
        if {images.dtype, masks.dtype} != {np.dtype("uint8")} or self.channels not in (1, 3):
            raise self._damaged(f"images {images.dtype}, masks {masks.dtype}, {self.channels} channels")
        if {len(part) for part in (self.part, self.files, self.original_sizes, self.has_mask)} != {count}:
            raise self._damaged(f"{count} ids, but not as many parts, files, sizes and marks of a mask")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __len__(self):
        return len(self.ids)

    def images(self, positions):
        """uint8 (n, H, W, C), in the order of `positions`."""
        return self._read("images", positions)

    def masks(self, positions):
        """uint8 0/1 (n, H, W), in the order of `positions`; 0 where there is no mask."""
        return self._read("masks", positions)

    def fingerprint(self):
        """A hash of what the file holds, a str: the same whenever and wherever it is made of the same images."""
        digest = blake2b(digest_size=16)
        for values in self.ids, self.part, self.has_mask, self.original_sizes:
            digest.update(repr(values.tolist()).encode())
        for first in range(0, len(self), 100):
            positions = range(first, min(first + 100, len(self)))
            digest.update(self.images(positions))
            digest.update(self.masks(positions))
        return digest.hexdigest()

    def _read(self, name, positions):
        stored = self._file[name]
        pixels = np.empty((len(positions), *stored.shape[1:]), stored.dtype)
        try:
            for n, position in enumerate(positions):  # h5py's own lists of positions must be sorted, and are slower
                stored.read_direct(pixels, np.s_[position], np.s_[n])
        except OSError as error:
            raise self._damaged(error)
        return pixels

    def _damaged(self, error):
        reason = in_one_line(error)
        return UserError(f"{self.path}: not a data file of data.py, or a damaged one ({reason}); make it again")


class Split(NamedTuple):
    initial: np.ndarray  # positions labelled from the start
    pool: np.ndarray  # positions that the oracle can be asked for
    test: np.ndarray  # positions never seen in training


def split(dataset, initial=600, pool=1000, test=400, seed=SPLIT_SEED):
    """The paper's split of the dataset's training part, drawn by `seed`: a Split of sorted positions.

    The test images depend on the seed and their number alone, so that results with more or fewer labels compare. Where
    some images have no mask, those for test and then the labelled ones are drawn from those that have one: the test
    images all have, the labelled ones as far as there are enough. Near-duplicates are on one side.
    Raises UserError if there are fewer images, or fewer with a mask, than asked for.
    """
    candidates = np.flatnonzero(dataset.part == "train")
    unused = len(candidates) - initial - pool - test
    if unused < 0:
        raise UserError(
            f"{dataset.path} has {len(candidates)} training images, too few for {initial} labelled + {pool} in the "
            f"pool + {test} for test; lower --initial, --pool or --test"
        )
    order = np.random.default_rng(seed).permutation(candidates)
    drawn = order[dataset.has_mask[order]]
    if len(drawn) < test:
        raise UserError(
            f"{dataset.path} has {len(drawn)} training images with a mask, too few for {test} for test; lower --test "
            "(0: no test), or give data.py the masks of more"
        )
    tested = drawn[len(drawn) - test :]
    others = order[~np.isin(order, tested)]
    labelled = others[np.argsort(~dataset.has_mask[others], kind="stable")][:initial]
    order = np.concatenate([labelled, others[~np.isin(others, labelled)], tested])
    side = np.repeat([0, 1, 3, 2], [initial, pool, unused, test])
    _join_near_duplicates(dataset, order, side == 2, side == 2)
    _join_near_duplicates(dataset, order, side, side == 2)
    return Split(*(np.sort(order[side == number]) for number in range(3)))


def _join_near_duplicates(dataset, order, side, in_test):
    """Exchange positions within `order`, in place, until both of each pair have the same `side`. in_test: bool (N,),
    the places of the test images, which keep to those with a mask."""
    place = {id: k for k, id in enumerate(dataset.ids[order]) if any(id in pair for pair in NEAR_DUPLICATES)}
    for pair in NEAR_DUPLICATES:
        if not place.keys() >= set(pair) or side[place[pair[0]]] == side[place[pair[1]]]:
            continue
        larger, smaller = sorted((place[id] for id in pair), key=lambda k: -np.sum(side == side[k]))
        for target in dict.fromkeys([side[larger], side[smaller], *np.unique(side[~in_test])]):
            moved = order.copy()
            if all(_move(dataset, moved, side, in_test, k, target) for k in (larger, smaller) if side[k] != target):
                order[:] = moved
                break
        else:
            raise UserError(
                f"near-duplicates {pair[0]} and {pair[1]} do not fit on one side: enlarge the split, or lower --test"
            )


def _move(dataset, order, side, in_test, place, target):
    """Exchange what is at this place of `order` with something on the side `target`; returns whether that can be.

    What is exchanged is no other near-duplicate, and not without a mask if it comes to test; if possible, it has a mask
    if the first has one."""
    has_mask = dataset.has_mask[order]
    free = (side == target) & ~np.isin(dataset.ids[order], [id for pair in NEAR_DUPLICATES for id in pair])
    free &= (has_mask | ~in_test[place]) & (has_mask[place] | ~in_test)
    free = np.flatnonzero(free)
    if not len(free):
        return False
    partner = free[np.argmax(has_mask[free] == has_mask[place])]  # the first, if there is none
    order[[place, partner]] = order[[partner, place]]
    return True


def normalisation(dataset, positions):
    """Mean and standard deviation of each channel over all pixels of these images: two lists of float."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(positions), 100):
        pixels = dataset.images(positions[start : start + 100]).reshape(-1, dataset.channels).astype(np.float64)
        count += len(pixels)
        total, squares = total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    return mean.tolist(), np.maximum(std, 1.0).tolist()


def normalise(images, mean, std):
    """uint8 (..., C) to the network's input, float32 (..., C), with the mean and std that `normalisation` gave."""
    return (images - np.float32(mean)) / np.float32(std)


# --------------------------------------------------------------------------------------------------- the command line


def make_isic(args):
    """`data.py isic`: the challenge's folders to one file."""
    check_output(args.out, args.force)
    size = args.height, args.width, args.channels
    pairs = find_pairs(args.source)
    rows = map_in_order(lambda pair: read_pair(pair, *size), pairs)
    write_dataset(args.out, rows, len(pairs), *size, "ISIC 2017", args.force, args.source)
    print(f"{args.out}: {len(pairs)} images; next: python train.py --data {args.out}")


def make_folder(args):
    """`data.py folder`: the images in any folder, and the masks that there are, to one file."""
    check_output(args.out, args.force)
    size = args.height, args.width, args.channels
    pairs = find_folder(args.images, args.masks)
    rows = map_in_order(lambda pair: read_pair(pair, *size), pairs)
    write_dataset(args.out, rows, len(pairs), *size, f"folder {args.images}", args.force, args.images)
    masks = sum(bool(pair.mask) for pair in pairs)
    ask = "" if masks == len(pairs) else " --oracle folder"
    print(f"{args.out}: {len(pairs)} images, {masks} with a mask; next: python train.py --data {args.out}{ask}")


def make_synthetic(args):
    """`data.py synthetic`: drawn lesions to one file."""
    if not 1 <= args.images < 2**31 or args.seed < 0:
        raise UserError(
            f"--images {args.images} --seed {args.seed}: draw at least 1 image, below 2**31, seed 0 or above"
        )
    size = args.height, args.width, args.channels
    rows = map_in_order(lambda index: draw_row(index, args.seed, *size), range(args.images))
    write_dataset(args.out, rows, args.images, *size, f"synthetic lesions, seed {args.seed}", args.force)
    print(f"{args.out}: {args.images} images; next: python train.py --preset demo --data {args.out}")


def print_info(args):
    """`data.py info`: what is in a file."""
    with Dataset(args.file) as dataset:
        area = [dataset.masks([n]).mean() for n in track(np.flatnonzero(dataset.has_mask), "reading masks")]
        sizes = dataset.original_sizes
        print(f"source          {dataset.source}")
        print(f"images          {len(dataset)} of {dataset.height}x{dataset.width}, {dataset.channels} channel(s)")
        for part in PARTS:
            print(f"  {part:<13} {np.sum(dataset.part == part)}")
        print(f"with a mask     {len(area)}")
        print(f"original sizes  {'x'.join(map(str, sizes.min(0)))} to {'x'.join(map(str, sizes.max(0)))}")
        if area:
            print(f"lesion area     median {np.median(area):.1%}, from {min(area):.1%} to {max(area):.1%} of the image")
        print(f"ids             {dataset.ids[0]} to {dataset.ids[-1]}")


def draw_sheet(args):
    """`data.py show`: a contact sheet of images spread evenly over the file, the mask's outline on each."""
    check_output(args.out, args.force)
    if not 1 <= args.images <= SHEET or Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--images {args.images}, {args.out}: draw 1 to {SHEET} images, to a file that ends in .png")
    with Dataset(args.file) as dataset:
        positions = np.unique(np.linspace(0, len(dataset) - 1, args.images).astype(int))
        rows = -(-len(positions) // 6)
        figure = Figure(figsize=(12, 12 * rows / 6))
        axes = figure.subplots(rows, 6, squeeze=False)
        for ax, position in zip(axes.flat, positions):
            ax.imshow(dataset.images([position])[0], cmap="gray")
            if dataset.has_mask[position]:
                ax.contour(dataset.masks([position])[0], [0.5], colors="cyan", linewidths=1)
            ax.set_title(dataset.ids[position], fontsize=8)
        for ax in axes.flat:
            ax.axis("off")
    with whole_file(args.out) as partial:
        figure.savefig(partial, dpi=120, bbox_inches="tight")
    print(f"{args.out}: {len(positions)} of the file's images")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, help, *arguments):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        for argument in arguments:
            sub.add_argument(argument)
        return sub

    isic = command("isic", make_isic, "read the ISIC 2017 challenge's folders", "source", "out")
    folder = command("folder", make_folder, "read any folder of images", "images", "out")
    folder.add_argument("--masks", metavar="DIR", help="ID.png or ID_segmentation.png of some images, all, or none")
    synthetic = command("synthetic", make_synthetic, "draw dermoscopy-like lesions", "out")
    synthetic.add_argument("--images", type=int, default=280, help="how many (default %(default)s)")
    synthetic.add_argument("--seed", type=int, default=1, help="which (default %(default)s)")
    for sub in (isic, folder, synthetic):
        sub.add_argument("--height", type=int, default=192, help="rows, a multiple of 16 (default %(default)s)")
        sub.add_argument("--width", type=int, default=240, help="columns, a multiple of 16 (default %(default)s)")
        sub.add_argument("--channels", type=int, default=1, choices=(1, 3), help="1 grey, 3 RGB (default 1)")
    command("info", print_info, "print what is in a data file", "file")
    show = command("show", draw_sheet, "draw a contact sheet of a data file", "file", "out")
    show.add_argument("--images", type=int, default=24, help="how many (default %(default)s)")
    for sub in (isic, folder, synthetic, show):
        sub.add_argument("--force", action="store_true", help="replace the output if it exists")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    run_command(main)
