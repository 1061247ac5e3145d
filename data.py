"""Folders of images, or synthetic lesions, to one HDF5 file; reading that file; the split.

python data.py isic isic2017 datasets/isic2017.h5               # 192x240, one grey channel, as in the paper
python data.py folder photos datasets/photos.h5 --masks masks   # your own images, with masks for some, all or none
python data.py synthetic datasets/synthetic.h5 --images 280     # lesions drawn by the program, no download
python data.py info datasets/isic2017.h5
python data.py show datasets/isic2017.h5 sheet.png
"""

import argparse
import os
import re
import shutil
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from figures import new_figure
from pictures import NOT_AN_IMAGE, SUFFIXES, read_image, read_mask
from synthetic import draw_lesion
from utils import (
    LARGEST_SIDE,
    UserError,
    composed,
    derived_seed,
    in_one_line,
    map_in_order,
    reserve,
    run_command,
    track,
    whole_file,
)

LAYOUT_VERSION = 2
PARTS = {"train": "Training", "validation": "Validation", "test": "Test_v2"}  # ours: the challenge's
SPLIT_SEED = 2017
SHEET = 1000  # images on a contact sheet, which is 30 pixels high for each
# Two pictures of one lesion each: on one side of any split.
NEAR_DUPLICATES = [
    ("ISIC_0012290", "ISIC_0013594"),
    ("ISIC_0012672", "ISIC_0012673"),
    ("ISIC_0012756", "ISIC_0013184"),
]


# ------------------------------------------------------------------------------------------------ the folders of images


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


def draw_row(index, seed, height, width, channels):
    """Lesion number `index` of those that `seed` gives, whatever their number."""
    image, mask = draw_lesion(np.random.default_rng([seed, index]), height, width)
    if channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return Row(f"SYNTHETIC_{index:07d}", "train", (height, width), image, mask)


# -------------------------------------------------------------------------------------------------------- the HDF5 file


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


# ------------------------------------------------------------------------------------------------------------ the split


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


def hold_out(parts, dataset, validation, seed):
    """The data.Split with so many of the labelled images, drawn by the seed, in place of the test images; none that has
    a near-duplicate, which may be trained on."""
    if not validation:
        return parts
    alone = ~np.isin(dataset.ids, np.ravel(NEAR_DUPLICATES))
    with_mask = parts.initial[(dataset.has_mask & alone)[parts.initial]]
    if len(with_mask) < validation:
        raise UserError(f"--validation {validation}: only {len(with_mask)} of the --initial images have masks")
    held_out = np.random.default_rng(derived_seed(seed, "validation")).permutation(with_mask)[:validation]
    return parts._replace(initial=np.setdiff1d(parts.initial, held_out), test=np.sort(held_out))


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


# ----------------------------------------------------------------------------------------------------- the command line


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
        figure = new_figure(figsize=(12, 12 * rows / 6))
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
