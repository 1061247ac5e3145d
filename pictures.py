"""Finds image and mask files, of any source, in folders. Reads them safely, or rejects one with one sentence.

Nothing here knows HDF5 or the network.
"""

import contextlib
import logging
import os
import re
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy.ndimage import maximum_filter, minimum_filter

from utils import UserError, composed, first_of

# Silence Pillow's warnings: a file is either read or rejected with our own message.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".j2k"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
LOSSY_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k"}
# Not read. In a camera's raw file, Pillow would read only the small preview.
TO_EXPORT = {
    ".heic",
    ".heif",
    ".hif",
    ".avif",
    ".dcm",
    ".dicom",
    ".dng",
    ".nef",
    ".cr2",
    ".cr3",
    ".arw",
    ".orf",
    ".rw2",
}
# Files and folders of file systems and editors, which are ignored.
IGNORED = {"thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__macosx"}
BACKUPS = ("~", ".bak", ".tmp", ".part", ".orig", "_original", ".crdownload", ".swp")
PARTS = {"train": "Training", "validation": "Validation", "test": "Test_v2"}  # our name: the challenge's
NOT_AN_IMAGE = ("_superpixels", "_segmentation")  # name endings of other files in ISIC's image folders
LOSSY = {"JPEG", "MPO", "JPEG2000"}
# The formats that are read, whatever the suffix. Some of the others that Pillow supports start a program.
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# What Pillow raises for a bad file.
UNREADABLE = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError)
UNREADABLE += (struct.error, Image.DecompressionBombError)
# The transposition that each EXIF orientation requires.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ----------------------------------------------------------------------------------------------- the files of a folder


class LeftOut(NamedTuple):
    """A file or folder that is not read, and why: a key of ADVICE."""

    path: str
    reason: str


ADVICE = {
    "format": "export HEIC, DICOM and camera raw files as PNG",
    "lossy": "lossy compression blurs a mask's outline, so export masks as PNG",
    "other": "",
    "folder": "--recursive reads folders",
    "link": "links to folders are not followed",
}


def list_pictures(folder, recursive=False, without=()):
    """List the picture files in a folder: by suffix, or by content if the suffix is none of SUFFIXES.

    recursive: also those in its subfolders. without: folders inside it to skip. Returns a list of (name, path), sorted,
    and a list of LeftOut. A name is that of the file without its suffix; that of sub/x.png is sub__x.
    Raises UserError if there is no such folder."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: {'not a folder' if os.path.exists(folder) else 'there is no such folder'}")
    skipped = [os.path.realpath(path) for path in without]
    pictures, left_out = [], []
    for name, path, is_folder in _entries(folder, recursive, skipped):
        stem, suffix = os.path.splitext(name)
        if is_folder:
            left_out.append(LeftOut(path, "link" if os.path.islink(path) else "folder"))
        elif suffix.lower() in SUFFIXES or (suffix.lower() not in TO_EXPORT and _is_picture(path)):
            pictures.append((composed(stem), path))
        else:
            left_out.append(LeftOut(path, "format" if _needs_export(path) else "other"))
    return pictures, left_out


def list_images(folder, recursive=False, without=()):
    """As `list_pictures`, without the masks and superpixels that ISIC keeps beside images. These are left out."""
    pictures, left_out = list_pictures(folder, recursive, without)
    images = [(name, path) for name, path in pictures if not name.lower().endswith(NOT_AN_IMAGE)]
    others = [LeftOut(path, "other") for name, path in pictures if name.lower().endswith(NOT_AN_IMAGE)]
    return images, left_out + others


def one_of_each(files):
    """The (name, path) pairs of `files` as a dict. Raises UserError if a name occurs twice."""
    found = {}
    for name, path in files:
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same id, {name}; remove or rename one of them")
        found[name] = path
    return found


def _entries(folder, recursive, skipped, prefix=""):
    """Yield (name, path, whether it is a folder) of each file and of each folder that is not searched, sorted."""
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        name, path = entry.name, entry.path
        if name.startswith(".") or name.lower() in IGNORED or name.lower().endswith(BACKUPS):
            continue
        linked = entry.is_symlink()  # links to folders are not followed, because they may form a circle
        if not (os.path.isdir(path) if linked else entry.is_dir()):
            yield prefix + name, path, False
        elif os.path.realpath(path) in skipped:
            continue
        elif recursive and not linked:
            yield from _entries(path, recursive, skipped, f"{prefix}{name}__")
        else:
            yield prefix + name, path, True


def _is_picture(path):
    try:
        with open_picture(path):
            return True
    except UserError:
        return False


def _needs_export(path):
    """Whether the file is a HEIC, DICOM or camera raw file, by its suffix or content."""
    if os.path.splitext(path)[1].lower() in TO_EXPORT:
        return True
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):  # reading a pipe or a device may never end
        return False
    with open(path, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or (start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"avi"))


def match_masks(folder, pictures, recursive=False, without=()):
    """Find the masks of `pictures`, a dict of name to path, in a folder.

    A mask is called NAME or NAME_segmentation, in any letter case, and has a format without losses. The pictures
    themselves are no masks. Returns a dict of name to the mask's path, the paths of the masks that have no picture,
    and a list of LeftOut. Raises UserError if two masks fit a picture, or a mask fits two pictures."""
    images, owners_of = {os.path.realpath(path) for path in pictures.values()}, {}
    for name in pictures:
        owners_of.setdefault(name.lower(), []).append(name)
    found, left_out = list_pictures(folder, recursive, without)
    found = [(stem, path) for stem, path in found if os.path.realpath(path) not in images]
    found = [(re.sub("_segmentation$", "", stem, flags=re.IGNORECASE), path) for stem, path in found]
    stems, masks, alone, lossy = {stem for stem, _ in found}, {}, [], []
    for stem, path in found:
        owners = owners_of.get(stem.lower(), [])
        if stem.lower().endswith("_superpixels"):
            continue
        if len(owners) > 1 and (stem not in pictures or not stems.issuperset(owners)):
            one, other, *_ = (pictures[owner] for owner in owners)
            raise UserError(f"{path} fits both {one} and {other}; rename one of the images")
        owner = stem if stem in pictures else "".join(owners)
        if is_lossy(path):
            lossy.append((owner, path))
        elif not owner:
            alone.append(path)
        elif owner in masks:
            raise UserError(f"{masks[owner]} and {path} are both masks of {pictures[owner]}; remove one")
        else:
            masks[owner] = path
    folders = {os.path.dirname(image) for image in images}  # a picture here without an owner need not be a mask
    lossy = [path for owner, path in lossy if owner not in masks and (owner or os.path.realpath(folder) not in folders)]
    return masks, alone, left_out + [LeftOut(path, "lossy") for path in lossy]


def is_lossy(path):
    """Whether a picture's suffix or, for WebP, its content stands for lossy compression."""
    if os.path.splitext(path)[1].lower() in LOSSY_SUFFIXES:
        return True
    return os.path.isfile(path) and _is_lossy_webp(path)


def _is_lossy_webp(file):
    """Whether a file, given as a path or a file object, is a WebP picture with lossy compression."""
    with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
        opened.seek(0)
        if opened.read(12)[8:] != b"WEBP":
            return False
        while len(chunk := opened.read(8)) == 8 and chunk[:4] not in (b"VP8 ", b"VP8L"):
            size = int.from_bytes(chunk[4:], "little")
            opened.seek(size + size % 2, os.SEEK_CUR)
        return chunk[:4] == b"VP8 "


def left_out_line(left_out):
    """One line about a list of LeftOut, or None: left out: 5 files (b6.HEIC, ...), 2 folders (old, ...); ..."""
    folders = [os.path.basename(path) for path, reason in left_out if reason in ("folder", "link")]
    files = [item for item in left_out if item.reason not in ("folder", "link")]
    files.sort(key=lambda item: item.reason == "other")
    parts = []
    for names, kind in ([os.path.basename(path) for path, _ in files], "file"), (folders, "folder"):
        if names:
            some = first_of(names)
            parts.append(f"{len(names)} {kind}{'s' * (len(names) > 1)} ({some})")
    advice = [text for reason, text in ADVICE.items() if text and any(item.reason == reason for item in left_out)]
    return f"left out: {'; '.join([', '.join(parts), *advice])}" if parts else None


# ----------------------------------------------------------------------------------------------- the folders of data.py


class Pair(NamedTuple):
    id: str
    part: str
    image: str  # paths as str, because 100,000 Path objects would take much memory
    mask: str  # "" if there is none


BESIDE = ".txt", ".csv", "_superpixels.png"  # what the challenge puts beside its images


def find_pairs(source):
    """Find the image and the mask of every id in the ISIC 2017 folders in `source`: a list of Pair, by part and id,
    and a list of LeftOut.

    They may be one level deeper, as the zips unpack. Raises UserError if a file is missing or an id is there twice.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder; give the folder that contains ISIC-2017_Training_Data")
    pairs, left_out = [], []
    for part, name in PARTS.items():
        images = _files_by_id(source, f"ISIC-2017_{name}_Data", r"(ISIC_\d+)\.jpe?g", left_out)
        masks = _files_by_id(source, f"ISIC-2017_{name}_Part1_GroundTruth", r"(ISIC_\d+)_segmentation\.png", left_out)
        if part == "train" and not images:
            raise UserError(f"{source}: no ISIC_*.jpg in ISIC-2017_Training_Data here or one level deeper; unpack it")
        for these, others, kind in ((images, masks, "mask"), (masks, images, "image")):
            alone = sorted(these.keys() - others.keys())
            if alone:
                raise UserError(
                    f"{these[alone[0]]} has no {kind} ({len(alone)} such files); unpack all {name} images and all of "
                    "their Part1_GroundTruth, or remove the file"
                )
        pairs += [Pair(id, part, images[id], masks[id]) for id in sorted(images)]
    (id, count), *_ = Counter(pair.id for pair in pairs).most_common(1)
    if count > 1:
        raise UserError(f"{id} is in two parts of the challenge's data; remove it from one of them")
    return pairs, left_out


def _files_by_id(source, folder, pattern, left_out):
    """A dict of id to path in the folders of this name. Adds files that the challenge does not have to `left_out`."""
    files = []
    for found in sorted([*source.glob(folder), *source.glob(f"*/{folder}")]):
        for name in sorted(os.listdir(found)) if found.is_dir() else []:
            if match := re.fullmatch(pattern, name, re.IGNORECASE):
                files.append((match[1].upper(), os.path.join(found, name)))
            elif not (name.startswith(".") or name.lower() in IGNORED or name.endswith(BESIDE)):
                left_out.append(LeftOut(os.path.join(found, name), "other"))
    return one_of_each(files)


def find_folder(images, masks=None, recursive=False):
    """Find the images in any folder, and the masks of some, all or none in the folder `masks`: a list of Pair, by id,
    and a list of pictures.LeftOut.

    An id is the image's name without its suffix; with `recursive`, that of sub/x.jpg is sub__x. `match_masks` says what
    a mask is called. Raises UserError if a mask has no image, if two files have the same id, or if no mask is found.
    """
    same_folder = masks and os.path.isdir(masks) and os.path.realpath(images) == os.path.realpath(masks)
    masks = images if same_folder else masks
    found, left_out = list_images(images, recursive, [masks] if masks and not same_folder else [])
    if not found:
        raise UserError("; ".join(filter(None, [f"{images}: no image in this folder", left_out_line(left_out)])))
    for name, path in found:
        if re.search("[\0-\x1f\ud800-\udfff]", name):
            raise UserError(f"{images}: the name {path!a} is not UTF-8 or has a control character; rename the file")
        if len(name.encode()) > 240:
            raise UserError(f"{images}: the id {name} is longer than 240 bytes; shorten the names in {path}")
    pictures, drawn = one_of_each(found), {}
    if masks:
        drawn, alone, unused = match_masks(masks, pictures, recursive, [] if same_folder else [images])
        if alone:
            raise UserError(f"{alone[0]} has no image ({len(alone)} such files); add the image or remove the mask")
        if not drawn:
            expected = f"--masks {masks}: no mask of any image, for example {next(iter(pictures))}.png"
            raise UserError("; ".join(filter(None, [expected, left_out_line(unused)])))
        used = set(drawn.values())
        left_out = [item for path, item in {item.path: item for item in left_out + unused}.items() if path not in used]
    return [Pair(id, "train", pictures[id], drawn.get(id, "")) for id in sorted(pictures)], left_out


# ------------------------------------------------------------------------------------------------- opening and turning


@contextlib.contextmanager
def open_picture(path, file=None):
    """Open a picture with Pillow, for a block that decodes it. Only the first page or frame is read.

    Raises UserError if the file is missing, a folder or a pipe, is not a picture, has more than 178 megapixels or is
    damaged. Damage may be found only in the block. file: a file object to read instead of `path`."""
    try:
        if not file and not os.path.isfile(path):  # reading a pipe or a device may never end
            raise UserError(f"{path}: {'not a regular file' if os.path.exists(path) else 'there is no such file'}")
        # Not by name, because Pillow then maps an uncompressed TIFF into memory, wrongly if it has an orientation.
        with file or open(path, "rb") as opened, Image.open(opened, formats=FORMATS) as picture:
            yield picture
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable picture, or of an unknown format; get it again, or export it as PNG")
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture ({error}); get or export it again")


def orientation(picture):
    """The EXIF orientation of an opened picture, 2 to 8, or None if it needs no turn.

    Also None if EXIF is damaged, because the pixels may still be good. Call it before `upright` or `load`."""
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return None
    return found if found in TURNS else None


def turn(picture, orientation):
    """The picture, a Pillow image, turned as this orientation requires; None turns nothing."""
    return picture if orientation is None else picture.transpose(TURNS[orientation])


def size_tells(orientation, size):
    """Whether the size (height, width) of a mask tells which way it was drawn on a picture with this orientation."""
    return orientation is None or (orientation > 4 and size[0] != size[1])


def other_way(mask, orientation):
    """The mask, uint8 (H, W), as it would be if it had been drawn on the pixels of its picture before their turn."""
    return np.asarray(turn(Image.fromarray(mask), orientation))


def upright(picture):
    """The picture of `open_picture` as displayed, turned by its EXIF orientation.

    Pillow's `exif_transpose` also rewrites all of EXIF, and fails if EXIF is damaged."""
    picture.load()  # turns a TIFF and removes its orientation
    return turn(picture, orientation(picture))


# -------------------------------------------------------------------------------------------------- images and masks


def read_image(path, height, width, channels):
    """Read a picture at the network's size. Returns uint8 (height, width, channels), and its original (height, width).

    One channel is the luminance. The aspect ratio is not kept, as in the paper. Down-sampling is anti-aliased.
    Of 16-bit colour the high byte is read. Raises UserError for more than 8 bits in grey, or if the file is damaged.
    """
    mode = "L" if channels == 1 else "RGB"
    with open_picture(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise UserError(f"{path}: more than 8 bits per channel; save it with 8 bits")
        if picture.format == "TIFF":
            picture.load()  # `size` is that of the turned picture from the start, but only this turns it
        turned = (orientation(picture) or 0) > 4
        original = picture.size if turned else picture.size[::-1]  # as displayed: (height, width)
        # Decode a JPEG at 1/2, 1/4 or 1/8 of its size, in grey if wanted: much less work, nearly the same result.
        picture.draft(mode, (height, width) if turned else (width, height))
        picture = upright(picture)
        picture = picture.convert("RGBA") if "transparency" in picture.info else picture  # Pillow would warn
        pixels = np.asarray(picture.convert(mode).resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, channels), original


def open_mask(path, file=None):
    """Read a mask at its own size, as displayed. Returns a Pillow image of mode L: skin is 0, lesion 255.

    Transparent pixels are skin. A mask has two values, of which the darker is black and the brighter is lesion, and
    possibly the grey of an interpolated edge between them, which is rounded. Raises UserError if the mask is
    unreadable, was compressed with losses, has several pages or other values. file: a file object to read instead of
    `path`.
    """
    with open_picture(path, file) as picture:
        if picture.format in LOSSY or picture.info.get("compression") == "jpeg":
            raise UserError(f"{path}: a JPEG blurs a mask's outline; save the mask as PNG")
        if picture.format == "WEBP" and _is_lossy_webp(file or path):
            raise UserError(f"{path}: a lossy WebP blurs a mask's outline; save the mask as PNG")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path}: {picture.n_frames} pages or layers; save the mask as a single picture")
        picture = upright(picture)
        opaque = picture.mode == "L" and not picture.has_transparency_data
        picture = picture if opaque else _in_grey(picture, path)  # no copy of a large mask
    counts = np.array(picture.histogram())
    (values,) = np.nonzero(counts)
    low, high = (values[0] if len(values) > 1 else 0), values[-1]
    possible = high <= 1 or high >= 240 if len(values) == 1 else low == 0 or (low < 16 and high >= 240)
    possible &= len(values) <= 2 or high >= 16  # 0, 1 and 2 are labels
    if not possible or (len(values) > 2 and not _at_edge(picture, len(values))):
        raise _other_values(path, "value", values.tolist())
    grey = counts[16 : max(high - 15, 16)].sum() / counts.sum()
    if grey > 0.02:
        raise UserError(f"{path}: not a mask, {grey:.0%} of it is neither black nor white; save it as 0 and 255")
    threshold = 128 if high >= 240 and len(values) > 2 else (low + high) // 2  # 128 as in the challenge's scorer
    return picture if not set(values) - {0, 255} else picture.point([255 * (v > threshold) for v in range(256)])


def _at_edge(picture, count):
    """Whether the pixels between the darkest and the brightest of the `count` values of a picture of mode L are the
    grey of an interpolated edge. A third label has areas of one value, or touches only one of the other two."""
    pixels = np.asarray(picture)
    low, high = picture.getextrema()
    between = (pixels > low) & (pixels < high)
    darkest, brightest = minimum_filter(pixels, 3)[between], maximum_filter(pixels, 3)[between]
    pixels = pixels[between]
    area = np.mean(darkest == brightest)
    aside = np.mean((darkest == pixels) | (brightest == pixels))
    # Lanczos interpolation and JPEG add waves of many values beside the edge.
    return area <= 0.05 and aside <= (0.1 if count < 10 else 0.5)


def _other_values(path, kind, values):
    """A UserError that names the first six of these values (or colours) of what is not a mask."""
    some = first_of(values, 6)
    found = f"{len(values)} {kind}{'s' * (len(values) > 1)}: {some}" if values else f"more than 256 {kind}s"
    return UserError(f"{path}: not a mask, it has {found}; save it with two, 0 for skin and 255 for lesion")


def _in_grey(picture, path):
    """Convert a picture of any mode to mode L. If it has two colours and one is black, the other becomes white."""
    if picture.mode.startswith(("I", "F")):  # Pillow would clip at 255
        pixels = np.asarray(picture)
        lesion = pixels > 0
        if not np.all((pixels == 0) | (pixels == pixels.max())):  # less memory than np.unique
            raise _other_values(path, "value", np.unique(pixels).tolist())
        return Image.fromarray(255 * lesion.astype(np.uint8))
    painted = None
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        painted = layer.getchannel("A").getextrema()
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), layer)
    picture = picture.convert("RGB")
    if painted and painted[0] < painted[1] and not picture.getbbox():
        raise UserError(f"{path}: all that is painted is black, on a transparent layer; paint the lesion white")
    colors = sorted(color for _, color in picture.getcolors(256) or [])
    if len(colors) == 2 and colors[0] == (0, 0, 0):
        picture = picture.point(3 * [0, *255 * [255]])
    elif not colors or any(len(set(color)) > 1 for color in colors):
        raise _other_values(path, "colour", colors)
    return picture.convert("L")


def shrink_mask(picture, height, width):
    """Resize a mask of `open_mask` to the network's size. Returns uint8 0/1 (height, width)."""
    # reducing_gap averages blocks of pixels first. Without it a large mask takes longer to resize than to read.
    small = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3)
    return (np.asarray(small) > 127).astype(np.uint8)


def read_mask(path, height, width):
    """Read a mask at the network's size. Returns uint8 0/1 (height, width), and its original (height, width).

    Raises UserError as `open_mask` does, and if the mask is empty.
    """
    return read_mask_and_cover(path, height, width)[:2]


def read_mask_and_cover(path, height, width):
    """As `read_mask`; returns also the `mask_cover` of the mask at its original size."""
    picture = open_mask(path)
    small = shrink_mask(picture, height, width)
    if not small.any():
        raise UserError(f"{path}: the mask is empty at {height}x{width}; draw the lesion, or remove image and mask")
    return small, picture.size[::-1], mask_cover(np.asarray(picture))


def mask_cover(mask):
    """Whether a mask, 0 and any other value (H, W), covers all four corners of its picture, and its share of it.

    At the original size, because a mask that is made smaller may reach the corners."""
    return bool(mask[:: len(mask) - 1 or 1, :: mask.shape[1] - 1 or 1].all()), float(np.count_nonzero(mask) / mask.size)


def inverted_warning(covers):
    """A sentence if some masks seem to be black on white, else None. covers: a list of (name, corners, share), the last
    two of `mask_cover`.

    Of ISIC 2017's 2,000 training masks 168 cover over half of the picture, but none covers all four corners."""
    corners, large = ([name for name, *cover in covers if cover[k] > 0.5] for k in (0, 1))
    if corners:
        names, found = corners, "all four corners"
    elif len(covers) >= 4 and len(large) > len(covers) / 4:
        names, found = large, "over half"
    else:
        return None
    some = first_of(names)
    return (
        f"{len(names)} of {len(covers)} masks cover {found} of their picture ({some}): is the lesion white and the "
        "skin black? If not, invert these masks"
    )


def turned_warning(names):
    """A sentence about the masks with these names, whose size does not tell which way they were drawn, or None."""
    if not names:
        return None
    some = first_of(names)
    return (
        f"{len(names)} mask{'s' * (len(names) > 1)} ({some}) taken as drawn on the picture as displayed, turned by its "
        "EXIF orientation; the size cannot tell, so check that the drawing program turned it too"
    )


def resize_map(values, size):
    """Resize a float32 map (H, W) to `size`, (height, width), by linear interpolation."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
