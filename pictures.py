"""Reads images and masks from the files that people have: a file is read safely, or rejected with one sentence.

Nothing here knows HDF5 or the network.
"""

import contextlib
import logging
import os
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils import UserError

# Silence Pillow's warnings: a file is either read or rejected with our own message.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
NOT_AN_IMAGE = ("_superpixels", "_segmentation")  # what ISIC's folders hold beside the images
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


def resize_map(values, size):
    """A float32 map (H, W) at the size (height, width), linearly interpolated."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
