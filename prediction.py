"""What becomes of each picture: the network's prediction, the files that are written, the comparison with a true mask;
and the record of finished pictures, with which a command goes on where it was stopped.

The command line is in predict.py. Here, too, is what a worker of a cluster does.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import binary_fill_holes
from skimage.measure import label, regionprops
from skimage.segmentation import find_boundaries

from ceal import uncertainty_score
from data import normalise
from pictures import (
    mask_cover,
    open_picture,
    orientation,
    other_way,
    read_image,
    read_mask,
    resize_map,
    size_tells,
    upright,
)
from utils import UserError, cores, expected_agreement, map_in_order, naming, segmentation_metrics, whole_file

MIRRORS = ((), (1,), (2,), (1, 2))  # the axes of (N, H, W, C) to reverse; the first entry is the image itself
THRESHOLDS = np.arange(1, 20) / 20
BATCH = 16
PIXELS = 48_000_000  # of the pictures that are read or written at the same time; each million takes up to 20 MB
SOFTWARE = "CEAL predict.py"  # marks the PNG files of this program


@dataclasses.dataclass
class Options:
    """What to do with the images. The defaults are the paper's: the plain prediction, with a threshold of 0.5."""

    out: Path
    threshold: float = 0.5
    tta: bool = False  # the mean over the mirrored images
    largest: bool = False  # keep only the largest part and fill its holes
    passes: int = 0  # Monte Carlo passes for the uncertainty; 0: no uncertainty
    overlay: bool = False
    truths: dict = dataclasses.field(default_factory=dict)  # an image's path to its true mask's path
    try_thresholds: bool = False  # evaluate the masks at THRESHOLDS too
    names: dict = dataclasses.field(default_factory=dict)  # an image's path to its name, if that is not its stem

    def name(self, path):
        """The name of an image, of which the names of its results are made."""
        return self.names.get(path, path.stem)

    def mask(self, name):
        """The path of the mask of the image with this name."""
        return self.out / f"{name}_segmentation.png"


# ------------------------------------------------------------------------------------------------------ the prediction


def read(path, settings):
    """Returns (path, image at the network's size, original (height, width)), or (path, UserError, None)."""
    try:
        return path, *read_image(path, settings["height"], settings["width"], settings["channels"])
    except UserError as error:
        return path, error, None


def save_png(pixels, path):
    """Write uint8 pixels to a PNG file, marked as this program's. It appears complete or not at all."""
    note = PngInfo()
    note.add_text("Software", SOFTWARE)
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial, pnginfo=note)


def is_ours(path):
    """Whether `save_png` wrote this file."""
    try:
        with open_picture(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except UserError:
        return False


def largest_part(mask):
    """The largest part (8-connected) of a bool mask (H, W), with its holes filled. An empty mask stays empty."""
    parts = regionprops(label(mask))
    kept = np.zeros_like(mask)
    if parts:
        largest = max(parts, key=operator.attrgetter("area"))
        kept[largest.slice] = binary_fill_holes(largest.image)
    return kept


def read_truth(path, size):
    """The true mask, uint8 (H, W), of an image of `size`. Raises UserError if it is unreadable or of another size."""
    true_mask, own_size = read_mask(path, *size)
    if own_size != size:
        sizes = "{}x{} and its image {}x{} rows x columns".format(*own_size, *size)
        raise UserError(f"{path} is {sizes}; get or draw a mask of the image's own size")
    return true_mask


def rate(mask, true_mask):
    """The challenge's metrics of a bool mask (H, W): a dict of name to float."""
    return {name: float(values[0]) for name, values in segmentation_metrics(true_mask[None], mask[None]).items()}


class Result(NamedTuple):
    name: str
    uncertainty: float | None  # the score; None without passes
    agreement: float | None  # utils.expected_agreement, likewise
    rating: dict | UserError | None  # from `rate`, or why it is impossible; None without a true mask
    curve: list  # the Dice at each of THRESHOLDS; empty if not asked for
    cover: tuple | None = None  # the true mask's, from pictures.mask_cover
    unclear: bool = False  # whether the true mask's size does not tell which way it was drawn
    turned: bool = False  # whether the other way fits the prediction far better


def save_results(path, size, prediction, variance, mean, options):
    """Write the files of one image. Returns its Result. Raises UserError if an overlay's image cannot be read again.

    size: the image's own (height, width). prediction, variance, mean: float32 maps (H, W); the last two may be None.
    """
    probability, name = resize_map(prediction, size), options.name(path)

    def cut(threshold):
        mask = probability > threshold
        return largest_part(mask) if options.largest else mask

    if options.overlay:  # first, so that an image that has gone since it was predicted gets no files
        with open_picture(path) as picture:
            pixels = np.array(upright(picture).convert("RGB"))
    mask = cut(options.threshold)
    save_png(mask.astype(np.uint8) * 255, options.mask(name))
    if variance is not None:
        # 0.25 is the largest variance that a probability can have.
        grey = np.round(resize_map(variance, size) / 0.25 * 255).astype(np.uint8)
        save_png(grey, options.out / "uncertainty" / f"{name}_uncertainty.png")
    if options.overlay:
        pixels[find_boundaries(mask, mode="thick")] = 0, 255, 255
        save_png(pixels, options.out / "overlay" / f"{name}_overlay.png")
    doubt = (None, None)
    if variance is not None:
        doubt = uncertainty_score(variance, mean), float(expected_agreement(mean[None])[0])
    result = Result(name, *doubt, None, [])
    if path in options.truths:
        try:
            result = evaluate(result, path, mask, cut, options)
        except UserError as error:
            result = result._replace(rating=error)
    return result


def evaluate(result, path, mask, cut, options):
    """Compare the mask, bool (H, W), of an image with its true mask. Returns the completed Result.

    cut: a function from a threshold to the mask. Raises UserError if the true mask cannot be used."""
    true_mask = read_truth(options.truths[path], mask.shape)
    rating = rate(mask, true_mask)
    curve = [rate(cut(t), true_mask)["dice"] for t in THRESHOLDS] if options.try_thresholds else []
    with open_picture(path) as picture:
        turn = orientation(picture)
    unclear, turned = not size_tells(turn, mask.shape), False
    if unclear:
        turned = rate(mask, other_way(true_mask, turn))["dice"] >= rating["dice"] + 0.3
    return result._replace(rating=rating, curve=curve, cover=mask_cover(true_mask), unclear=unclear, turned=turned)


def predict_batch(model, settings, batch, options):
    """Predict a list of (path, image, original size). Returns rows (path, original size, prediction, variance, mean);
    variance and mean are of the Monte Carlo passes, or None without passes."""
    paths, images, sizes = zip(*batch)
    images, normalisation = np.stack(images), {name: settings[name] for name in ("mean", "std")}
    inputs, mirrors = normalise(images, **normalisation), MIRRORS if options.tta else MIRRORS[:1]
    predictions = [np.flip(model.predict_on_batch(np.flip(inputs, axes)), axes) for axes in mirrors]
    mean = variance = [None] * len(batch)
    if options.passes:
        from sampler import mc_dropout  # here, because TensorFlow takes seconds to import

        mean, variance = mc_dropout(model, images, options.passes, seed=0, **normalisation)
    return zip(paths, sizes, np.mean(predictions, 0)[..., 0], variance, mean)


def in_batches(items):
    """Yield lists of up to BATCH items."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


class Room:
    """Room in memory for a number of pixels. Threads wait until there is enough for their picture."""

    def __init__(self, pixels):
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels):
        """Keep room for the block; all of it for a picture that has more pixels."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def pixels_of(path):
    """The number of pixels of a picture; 0 if it cannot be read."""
    try:
        with open_picture(path) as picture:
            return picture.width * picture.height
    except UserError:
        return 0


def predict_all(images, model, settings, options):
    """Write the results of every image. Reading, predicting and writing run at the same time.

    Yields the Result of each image in order, or a UserError if it could not be read. A batch is each BATCH images,
    readable or not, so that a part of the images that begins at a multiple of BATCH gives the same results."""
    room = Room(PIXELS)
    largest = max(map(pixels_of, itertools.islice(images, BATCH)), default=0)
    workers = min(cores(), max(2, PIXELS // max(largest, 1)))  # a waiting thread, too, keeps some memory

    def read_one(path):
        with room.take(pixels_of(path)):
            return read(path, settings)

    def save_one(row):
        if isinstance(row, UserError):
            return row
        with room.take(row[1][0] * row[1][1]):
            try:
                return save_results(*row, options)
            except UserError as error:
                return error

    def predicted():
        for batch in in_batches(map_in_order(read_one, images, workers)):
            readable = [row for row in batch if row[2] is not None]
            rows = iter(predict_batch(model, settings, readable, options) if readable else ())
            yield from (image if size is None else next(rows) for _, image, size in batch)

    yield from map_in_order(save_one, predicted(), workers)


# ---------------------------------------------------------------------------------------- several machines, and starts


class Predicting:
    """Predicts pieces of a list of images as a worker of a cluster. task: the dict that `predict.py` made."""

    def __init__(self, task):
        from devices import use_devices  # here, because TensorFlow takes seconds to import
        from unet import build_from

        use_devices()
        self.settings, self.options = task["settings"], task["options"]
        self.model = build_from(self.settings, task["precision"])

    def begin(self, task):
        """Take the weights. Returns True: this machine reads the images itself."""
        self.model.set_weights(task["weights"])
        return True

    def do(self, images, truths):
        """Predict the images, a dict of path to (name, whether the driver sees it). Returns what `as_row` makes of
        each. Raises UserError if an image is missing on this machine alone."""
        for path, (_, seen) in images.items():
            if seen and not path.exists():
                raise UserError(f"there is no {path} on this machine; put the images on a shared disk")
        names = {path: name for path, (name, _) in images.items()}
        options = dataclasses.replace(self.options, names=names, truths=truths)
        return [
            as_row(name, found, options)
            for name, found in zip(names.values(), predict_all(names, self.model, self.settings, options))
        ]


def as_row(name, found, options):
    """What the record keeps of an image, a list: its name, its mask's size and time, its Result or its error."""
    if isinstance(found, UserError):
        return [name, None, str(found)]
    stat = options.mask(name).stat()
    if isinstance(found.rating, UserError):
        found = found._replace(rating=str(found.rating))
    return [name, [stat.st_size, stat.st_mtime_ns], found]


def from_row(row):
    """The Result or the UserError in a row of `as_row`, also if it comes from a file."""
    if isinstance(row[2], str):
        return UserError(row[2])
    found = Result(*row[2])
    return found._replace(rating=UserError(found.rating)) if isinstance(found.rating, str) else found


class Record:
    """A hidden file in the folder of the masks, with a row of each finished image, in order. It is removed when all are
    done, and the same command goes on with it if it was stopped."""

    def __init__(self, command, paths, options):
        """command: what the results depend on beside these files and `options`."""
        digest, seen = hashlib.blake2b(digest_size=8), dataclasses.replace(options, truths={}, names={})
        digest.update(repr((command, seen)).encode(errors="surrogateescape"))
        for path in paths:
            with contextlib.suppress(OSError):  # it cannot be read, and is told of later
                stat = os.stat(path)
                digest.update(
                    f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
                )
        self.path, self.options = options.out / f".predict-{digest.hexdigest()}.jsonl", options

    def done(self, names):
        """The Result or UserError of each of the first of these names that are done: a multiple of BATCH."""
        rows, ends = [], [0]
        if not self.path.exists():
            return rows
        with naming(self.path), open(self.path, "r+b") as file:
            for name, line in zip(names, file):
                with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
                    row = json.loads(line)
                    if line.endswith(b"\n") and row[:2] == as_row(name, from_row(row), self.options)[:2]:
                        rows.append(from_row(row))
                        ends.append(ends[-1] + len(line))
                        continue
                break
            count = len(rows) if len(rows) == len(names) else len(rows) // BATCH * BATCH
            file.truncate(ends[count])
        return rows[:count]

    def make(self):
        """Make the folder of the masks, and the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def remove(self):
        """Remove the file, and the folder if no mask is in it."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def add(self, row):
        """Append a row of `as_row`."""
        self.make()
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
