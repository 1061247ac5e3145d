"""Converts folders of images, or synthetic lesions, to one HDF5 file; reads that file; splits the data set.
Image files are decoded in pictures.py. Nothing here needs TensorFlow.

python data.py isic isic2017 datasets/isic2017.h5               # 192x240, one grey channel, as in the paper
python data.py folder photos datasets/photos.h5 --masks masks   # your own images, with masks for some, all or none
python data.py synthetic datasets/synthetic.h5 --images 280     # lesions drawn by the program, no download
python data.py info datasets/isic2017.h5
python data.py show datasets/isic2017.h5 sheet.png
"""

import argparse
import itertools
import os
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from figures import new_figure
from pictures import (
    PARTS,
    find_folder,
    find_pairs,
    inverted_warning,
    left_out_line,
    open_picture,
    orientation,
    read_image,
    read_mask,
    read_mask_and_cover,
    size_tells,
    turned_warning,
)
from strategies import typical
from synthetic import draw_lesion
from utils import (
    LARGEST_SIDE,
    UserError,
    derived_seed,
    in_one_line,
    map_in_order,
    open_hdf5,
    print_error,
    print_warning,
    printable,
    reserve,
    run_command,
    track,
    whole_file,
)

LAYOUT_VERSION = 2
SPLIT_SEED = 2017
SHEET = 1000  # the most images on a contact sheet; each adds 30 pixels to its height
# Pairs of images that show the same lesion. A split never separates them.
NEAR_DUPLICATES = [
    ("ISIC_0012290", "ISIC_0013594"),
    ("ISIC_0012672", "ISIC_0012673"),
    ("ISIC_0012756", "ISIC_0013184"),
]


# ---------------------------------------------------------------------------------------------------- reading the pairs


def read_pair(pair, height, width, channels):
    """Read the image and, if there is one, the mask of a Pair. Returns a Row. Raises UserError if a file is unreadable
    or the aspect ratios differ by more than 2 %."""
    image, size = read_image(pair.image, height, width, channels)
    if not pair.mask:
        return Row(pair.id, pair.part, size, image, None, pair.image)
    mask, mask_size, cover = read_mask_and_cover(pair.mask, height, width)
    with open_picture(pair.image) as picture:
        turn = orientation(picture)
    sideways = turn is not None and turn > 4
    if not _same_aspect(mask_size, size) or (sideways and mask_size == size[::-1] != size):
        sizes = "{}x{} and its image {}x{} rows x columns".format(*mask_size, *size)
        raise UserError(f"{pair.mask} is {sizes}, with another aspect ratio; get or draw the mask again")
    unclear = not size_tells(turn, size) or (sideways and mask_size != size and _same_aspect(size, size[::-1]))
    return Row(pair.id, pair.part, size, image, mask, pair.image, cover, unclear)


def _same_aspect(one, other):
    return abs(one[1] * other[0] / (one[0] * other[1]) - 1) <= 0.02


def read_pairs(pairs, height, width, channels):
    """Yield the Row of each Pair. At the end, print what is doubtful about the masks.

    If files cannot be used, all pairs are read, the first 100 errors are printed, and UserError is raised."""
    errors, covers, unclear = [], [], []

    def read(pair):
        try:
            return read_pair(pair, height, width, channels), []
        except UserError as error:
            return None, [error, *_other_error(pair, error, height, width)]

    for row, found in map_in_order(read, pairs):
        errors += found
        if not errors:
            yield row
            covers += [(row.id, *row.cover)] * (row.mask is not None)
            unclear += [row.id] * row.unclear
    if len(errors) == 1:
        raise errors[0]
    if errors:
        for error in errors[:100]:
            print_error(error)
        raise UserError(f"{len(errors)} files cannot be used, and nothing is written; correct or remove them")
    for warning in filter(None, (inverted_warning(covers), turned_warning(unclear))):
        print_warning(warning)


def _other_error(pair, error, height, width):
    """The error of a Pair's mask, if there is one and it is not `error` itself: a list of UserError."""
    try:
        if pair.mask:
            read_mask(pair.mask, height, width)
    except UserError as other:
        return [other] if str(other) != str(error) else []
    return []


def draw_row(index, seed, height, width, channels):
    """Draw synthetic lesion number `index` of `seed`; it does not depend on how many are drawn. Returns a Row."""
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
    mask: np.ndarray  # uint8 0/1 (H, W); None if there is none
    file: str = ""  # the image's path
    cover: tuple = ()  # the mask's, from pictures.mask_cover
    unclear: bool = False  # whether its size does not tell which way the mask was drawn


def write_dataset(out, rows, count, height, width, channels, source, force=False, folder=""):
    """Write `count` rows to the HDF5 file `out`. The file appears complete or not at all.

    It contains `images`, uint8 (N, H, W, C), and `masks`, uint8 0/1 (N, H, W), 0 without a mask, one chunk per image;
    `has_mask`, bool (N,); `ids`; `part`; `original_sizes`, (height, width); `files`, image paths relative to `folder`;
    the attributes source, folder, height, width, channels, layout_version.
    Raises UserError if `out` exists (unless `force`), the size does not suit the network, or the disk lacks space.
    """
    out = Path(out)
    check_output(out, force)
    if height % 16 or width % 16 or min(height, width) < 16 or max(height, width) > LARGEST_SIDE:
        raise UserError(
            f"--height {height} --width {width}: the network halves both four times; use multiples of 16, at most "
            f"{LARGEST_SIDE}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = count * (height * width * (channels + 1) + 1000) + 100_000  # 1 kB per image for id, sizes and index
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"{out.parent} has {free / 1e6:.1f} MB free and {out.name} needs {needed / 1e6:.1f} MB")
    with whole_file(out) as partial:
        reserve(partial, needed)
        with h5py.File(
            partial, "w", libver="v110", locking=False
        ) as file:  # v110 has a small index, even of many chunks
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
                raise UserError(f"{out}: the written file reads back differently; check the disk and try again")


def check_output(path, force):
    """Raise UserError if `path` is a folder, or if it exists and `force` is false."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if Path(path).exists() and not force:
        raise UserError(f"{path} exists already; give another name, or --force to replace it")


class Dataset:
    """An HDF5 file of `write_dataset`, open for reading. Images are addressed by their position in the whole file.

    Attributes: path, source, folder, height, width, channels; ids, part, files: str arrays (N,); has_mask: bool (N,);
    original_sizes: int (N, 2). Raises UserError if the file is missing or damaged, also on a later read.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():  # opening a pipe would block
            raise UserError(f"{path}: there is no such file")
        try:
            self._file = open_hdf5(path)
            version = self._file.attrs["layout_version"]
            if version != LAYOUT_VERSION:
                raise UserError(f"{path} has layout version {version}, not {LAYOUT_VERSION}; make it again")
            self.source, self.folder = self._file.attrs["source"], self._file.attrs["folder"]
            _, self.height, self.width, self.channels = self._file["images"].shape
            self.ids, self.part, self.files = (self._file[name].asstr()[:] for name in ("ids", "part", "files"))
            self.original_sizes = self._file["original_sizes"][:]
            self.has_mask = self._file["has_mask"][:]
            self._check()
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error)

    def _check(self):
        """Raise UserError if the arrays in the file do not fit together."""
        count, size = len(self.ids), (self.height, self.width)
        images, masks = self._file["images"], self._file["masks"]
        if not count or images.shape != (count, *size, self.channels) or masks.shape != (count, *size):
            raise self._damaged(f"{count} ids, images {images.shape}, masks {masks.shape}")
        if {images.dtype, masks.dtype} != {np.dtype("uint8")} or self.channels not in (1, 3):
            raise self._damaged(f"images {images.dtype}, masks {masks.dtype}, {self.channels} channels")
        if {len(part) for part in (self.part, self.files, self.original_sizes, self.has_mask)} != {count}:
            raise self._damaged(f"{count} ids, but part, files, original_sizes or has_mask has another length")

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
        """A hash of images, masks, ids, parts and sizes, a str. It does not depend on when the file was written. It
        reads the whole file: as long as the stamp is the same, the fingerprint is too."""
        digest = blake2b(digest_size=16)
        for values in self.ids, self.part, self.has_mask, self.original_sizes:
            digest.update(repr(values.tolist()).encode())
        for first in range(0, len(self), 100):
            positions = range(first, min(first + 100, len(self)))
            digest.update(self.images(positions))
            digest.update(self.masks(positions))
        return digest.hexdigest()

    def stamp(self):
        """The file's size in bytes and when it was last changed, in ns: a list of two int."""
        about = os.stat(self.path)
        return [about.st_size, about.st_mtime_ns]

    def _read(self, name, positions):
        stored, positions = self._file[name], np.asarray(positions, int)
        pixels = np.empty((len(positions), *stored.shape[1:]), stored.dtype)
        edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1), len(positions)]
        try:
            # Neighbours are read at once, 20 times as fast as one by one. Indexing h5py with a list needs sorted
            # positions and is slower.
            for first, end in itertools.pairwise(edges) if len(positions) else ():
                start = positions[first]
                stored.read_direct(pixels, np.s_[start : start + end - first], np.s_[first:end])
        except OSError as error:
            raise self._damaged(error)
        return pixels

    def _damaged(self, error):
        reason = in_one_line(error)
        return UserError(f"{self.path}: not written by data.py, or damaged ({reason}); make it again")


# ------------------------------------------------------------------------------------------------------------ the split


class Split(NamedTuple):
    initial: np.ndarray  # positions labelled from the start
    pool: np.ndarray  # positions that can be queried
    test: np.ndarray  # positions never used in training


def split(dataset, initial=600, pool=1000, test=400, seed=SPLIT_SEED):
    """The paper's split of the data set's training part, drawn with `seed`: a Split of sorted positions.

    The test images depend only on the seed and their number, so that results with more or fewer labels can be compared.
    Test images, then labelled images, are drawn from the images that have a mask. If these run out, the other labelled
    images have none. Near-duplicates are never separated.
    Raises UserError if there are too few images or masks, or if near-duplicates cannot be kept together.
    """
    candidates = np.flatnonzero(dataset.part == "train")
    unused = len(candidates) - initial - pool - test
    if unused < 0:
        raise UserError(
            f"{dataset.path} has {len(candidates)} training images, too few for {initial} labelled + {pool} pool "
            f"+ {test} test images; lower --initial, --pool or --test"
        )
    order = np.random.default_rng(seed).permutation(candidates)
    with_mask = order[dataset.has_mask[order]]
    if len(with_mask) < test:
        raise UserError(
            f"{dataset.path} has {len(with_mask)} training images with a mask, too few for {test} test images; lower "
            "--test (0: no test), or give data.py more masks"
        )
    tested = with_mask[len(with_mask) - test :]
    others = order[~np.isin(order, tested)]
    labelled = others[np.argsort(~dataset.has_mask[others], kind="stable")][:initial]
    order = np.concatenate([labelled, others[~np.isin(others, labelled)], tested])
    side = np.repeat([0, 1, 3, 2], [initial, pool, unused, test])
    _join_near_duplicates(dataset, order, side == 2, side == 2)
    _join_near_duplicates(dataset, order, side, side == 2)
    return Split(*(np.sort(order[side == number]) for number in range(3)))


def _join_near_duplicates(dataset, order, side, in_test):
    """Exchange positions within `order`, in place, until both images of each pair have the same `side`.

    in_test: bool (N,), the places of the test images, which must have a mask."""
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
                f"near-duplicates {pair[0]} and {pair[1]} do not fit into one part of the split; change --initial or "
                "--pool, or lower --test"
            )


def _move(dataset, order, side, in_test, place, target):
    """Exchange the image at `place` of `order` with one on the side `target`. Returns whether that was possible.

    The other image is never a near-duplicate, and no image without a mask moves to a test place. If possible, both
    images have a mask or both have none."""
    has_mask = dataset.has_mask[order]
    free = (side == target) & ~np.isin(dataset.ids[order], [id for pair in NEAR_DUPLICATES for id in pair])
    free &= (has_mask | ~in_test[place]) & (has_mask[place] | ~in_test)
    free = np.flatnonzero(free)
    if not len(free):
        return False
    partner = free[np.argmax(has_mask[free] == has_mask[place])]  # the first one if none agrees
    order[[place, partner]] = order[[partner, place]]
    return True


def hold_out(parts, dataset, validation, seed):
    """The Split with `validation` of the labelled images, drawn with `seed`, as test images; unchanged if 0.

    Images with a near-duplicate are not drawn, because training may use the other one. Raises UserError if there are
    too few."""
    if not validation:
        return parts
    alone = ~np.isin(dataset.ids, np.ravel(NEAR_DUPLICATES))
    with_mask = parts.initial[(dataset.has_mask & alone)[parts.initial]]
    if len(with_mask) < validation:
        raise UserError(
            f"--validation {validation}: only {len(with_mask)} initial images have a mask and no duplicate; lower it"
        )
    held_out = np.random.default_rng(derived_seed(seed, "validation")).permutation(with_mask)[:validation]
    return parts._replace(initial=np.setdiff1d(parts.initial, held_out), test=np.sort(held_out))


def start_anew(parts, dataset, start="random", seed=0):
    """The Split with other images labelled at first, as many: drawn at random with `seed`, or `typical` ones
    (strategies.typical) of their thumbnails. Unchanged if the start is `random` and the seed 0.

    The test images remain. As in `split`, images with a mask come first, and near-duplicates are never separated."""
    if start == "random" and not seed:
        return parts
    rng, chosen = np.random.default_rng(derived_seed(seed, "start")), np.array([], int)
    others = np.sort(np.concatenate([parts.initial, parts.pool]))
    for some in others[dataset.has_mask[others]], others[~dataset.has_mask[others]]:
        count = min(len(parts.initial) - len(chosen), len(some))
        if start == "typical":
            drawn = some[typical(thumbnails(dataset, some), count, rng)] if count else some[:0]
        else:
            drawn = rng.permutation(some)[:count]
        chosen = np.concatenate([chosen, drawn])
    order = np.concatenate([chosen, others[~np.isin(others, chosen)]])
    side = np.repeat([0, 1], [len(parts.initial), len(parts.pool)])
    _join_near_duplicates(dataset, order, side, np.zeros(len(order), bool))
    return parts._replace(initial=np.sort(order[side == 0]), pool=np.sort(order[side == 1]))


def thumbnails(dataset, positions):
    """The means of 16x16 equal parts of each image, in each channel: float32 (n, 256 C)."""
    grid = (16, dataset.height // 16, 16, dataset.width // 16, dataset.channels)
    some = (dataset.images([position]).reshape(grid).mean((1, 3), dtype=np.float32) for position in positions)
    return np.stack([values.ravel() for values in some])


def split_of_run(config, dataset):
    """The Split of a run with this Config: `split`, then `hold_out`, then `start_anew`."""
    parts = split(dataset, config.initial, config.pool, config.test, config.split_seed)
    parts = hold_out(parts, dataset, config.validation, config.split_seed)
    return start_anew(parts, dataset, config.start, config.initial_seed)


def normalisation(dataset, positions):
    """Mean and standard deviation (at least 1) of each channel over all pixels of these images: two lists of float."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(positions), 100):
        pixels = dataset.images(positions[start : start + 100]).reshape(-1, dataset.channels).astype(np.float64)
        count += len(pixels)
        total, squares = total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    return mean.tolist(), np.maximum(std, 1.0).tolist()


def normalise(images, mean, std):
    """Convert uint8 (..., C) to the network's input, float32 (..., C). mean, std: as `normalisation` returns them."""
    return (images - np.float32(mean)) / np.float32(std)


# ----------------------------------------------------------------------------------------------------- the command line


def make_isic(args):
    """`data.py isic`: convert the challenge's folders to one file."""
    check_output(args.out, args.force)
    size = args.height, args.width, args.channels
    pairs, left_out = find_pairs(args.source)
    write_dataset(args.out, read_pairs(pairs, *size), len(pairs), *size, "ISIC 2017", args.force, args.source)
    print(f"{args.out}: {len(pairs)} images; next: python train.py --data {args.out}")
    if left_out:
        print(printable(left_out_line(left_out)))


def make_folder(args):
    """`data.py folder`: convert the images in any folder, and their masks if any, to one file."""
    check_output(args.out, args.force)
    size = args.height, args.width, args.channels
    pairs, left_out = find_folder(args.images, args.masks, args.recursive)
    write_dataset(
        args.out, read_pairs(pairs, *size), len(pairs), *size, f"folder {args.images}", args.force, args.images
    )
    masks = sum(bool(pair.mask) for pair in pairs)
    ask = "" if masks == len(pairs) else " --oracle folder"
    print(f"{args.out}: {len(pairs)} images, {masks} with a mask; next: python train.py --data {args.out}{ask}")
    if left_out:
        print(printable(left_out_line(left_out)))


def make_synthetic(args):
    """`data.py synthetic`: draw lesions into one file."""
    if not 1 <= args.images < 2**31 or args.seed < 0:
        raise UserError(
            f"--images {args.images} --seed {args.seed}: give 1 to 2**31 - 1 images, and a seed of 0 or above"
        )
    size = args.height, args.width, args.channels
    rows = map_in_order(lambda index: draw_row(index, args.seed, *size), range(args.images))
    write_dataset(args.out, rows, args.images, *size, f"synthetic lesions, seed {args.seed}", args.force)
    print(f"{args.out}: {args.images} images; next: python train.py --preset demo --data {args.out}")


def print_info(args):
    """`data.py info`: print what a data file contains."""
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
    """`data.py show`: draw a contact sheet of images spread evenly over the file, each with its mask's outline."""
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
            ax.set_title(dataset.ids[position], fontsize=8, parse_math=False)
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

    isic = command("isic", make_isic, "convert the folders of the ISIC 2017 challenge", "source", "out")
    folder = command("folder", make_folder, "convert any folder of images", "images", "out")
    folder.add_argument("--masks", metavar="DIR", help="masks, ID.png or ID_segmentation.png, of some images or all")
    folder.add_argument("--recursive", action="store_true", help="read subfolders too; the id of sub/x.jpg is sub__x")
    synthetic = command("synthetic", make_synthetic, "draw synthetic lesions", "out")
    synthetic.add_argument("--images", type=int, default=280, help="number of images (default %(default)s)")
    synthetic.add_argument("--seed", type=int, default=1, help="random seed (default %(default)s)")
    for sub in (isic, folder, synthetic):
        sub.add_argument("--height", type=int, default=192, help="rows, a multiple of 16 (default %(default)s)")
        sub.add_argument("--width", type=int, default=240, help="columns, a multiple of 16 (default %(default)s)")
        sub.add_argument("--channels", type=int, default=1, choices=(1, 3), help="1 grey, 3 RGB (default 1)")
    command("info", print_info, "print what a data file contains", "file")
    show = command("show", draw_sheet, "draw a contact sheet of a data file", "file", "out")
    show.add_argument("--images", type=int, default=24, help="number of images (default %(default)s)")
    for sub in (isic, folder, synthetic, show):
        sub.add_argument("--force", action="store_true", help="replace the output if it exists")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    run_command(main)
