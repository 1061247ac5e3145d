"""Predicts masks: NAME_segmentation.png at the image's own size, 0 and 255, as the ISIC challenge expects them.

    python predict.py photo.jpg                                     # best weights of weights/, output in masks/
    python predict.py photo.jpg folder/ --weights runs/NAME/iteration_09/model.weights.h5 --out masks
    python predict.py folder/ --weights ... --uncertainty --overlay # also writes uncertainty maps and outlines
    python predict.py folder/ --weights ... --truth true_masks/     # also evaluates the masks

Masks and metrics.csv go to OUT, uncertainty maps and scores.csv to OUT/uncertainty, outlines to OUT/overlay.
"""

import argparse
import contextlib
import dataclasses
import itertools
import operator
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import binary_fill_holes
from scipy.stats import bootstrap
from skimage.measure import label, regionprops
from skimage.segmentation import find_boundaries

from ceal import uncertainty_score
from config import PRECISIONS
from data import normalise
from pictures import (
    inverted_warning,
    left_out_line,
    list_images,
    mask_cover,
    match_masks,
    open_picture,
    orientation,
    other_way,
    read_image,
    read_mask,
    resize_map,
    size_tells,
    turned_warning,
    upright,
)
from utils import (
    LIKELY_DISPUTED,
    UserError,
    composed,
    cores,
    expected_agreement,
    first_of,
    map_in_order,
    print_error,
    print_warning,
    printable,
    progress_bar,
    run_command,
    segmentation_metrics,
    whole_file,
    write_csv,
)

SHIPPED = [Path(__file__).parent / "weights" / f"{name}.weights.h5" for name in ("best", "paper")]  # the best first
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


# ---------------------------------------------------------------------------------------------------------- the inputs


def find_images(inputs, recursive=False, without=()):
    """The image files of `inputs` (files and folders), sorted within each folder: a dict of Path to name, and a list of
    pictures.LeftOut. recursive: search subfolders too, but not those in `without`; the name of sub/x.jpg is sub__x.

    Raises UserError if an input is missing or a folder without images, or if two masks would have the same name."""
    images, left_out = [], []
    for given in map(Path, inputs):
        if given.is_dir():
            found, others = list_images(given, recursive, without)
            if not found:
                raise UserError("; ".join(filter(None, [f"{given}: no image in this folder", left_out_line(others)])))
            paths = [Path(path) for _, path in found]
            images += [(path, "__".join([*path.relative_to(given).parts[:-1], path.stem])) for path in paths]
            left_out += others
        elif given.exists():
            images.append((given, given.stem))
        else:
            raise UserError(f"{given}: there is no such file or folder")
    seen = {}
    for path, name in images:
        if name in seen:
            raise UserError(f"{seen[name]} and {path} would have the same mask; rename one, or use another --out")
        seen[name] = path
    return dict(images), left_out


def find_truths(folder, images, recursive=False, without=()):
    """Find the true masks of `images`, a dict of Path to name, in `folder`; `match_masks` says what they are called.

    Returns a dict of an image's path to its mask's path, without the images that have no mask, and a list of
    pictures.LeftOut. Raises UserError if the folder is missing or has no mask of any image, or if a mask or an image
    has several matches."""
    if not folder.is_dir():
        raise UserError(f"--truth {folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    paths = {composed(name): path for path, name in images.items()}
    masks, _, left_out = match_masks(folder, paths, recursive, without)
    if not masks:
        expected = f"--truth {folder}: no true mask of any image, for example {next(iter(paths))}_segmentation.png"
        raise UserError("; ".join(filter(None, [expected, left_out_line(left_out)])))
    return {paths[name]: Path(mask) for name, mask in masks.items()}, left_out


def find_weights(given):
    """The path `given`, or that of the best shipped weights if it is None. Raises UserError if there are none."""
    found = [Path(given)] if given is not None else [path for path in SHIPPED if path.exists()]
    if not found:
        raise UserError("--weights is needed, because weights/ has none; give a model.weights.h5 that train.py wrote")
    return found[0]


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


def spare_masks(names, out):
    """Raise UserError if a mask in `out` that this program did not write would be overwritten."""
    for name in names:
        mask = out / f"{name}_segmentation.png"
        if mask.exists() and not is_ours(mask):
            raise UserError(f"{mask}: predict.py did not write it and would overwrite it; give another --out")


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
    """Write the files of one image. Returns its Result.

    size: the image's own (height, width). prediction, variance, mean: float32 maps (H, W); the last two may be None.
    """
    probability, name = resize_map(prediction, size), options.name(path)

    def cut(threshold):
        mask = probability > threshold
        return largest_part(mask) if options.largest else mask

    mask = cut(options.threshold)
    save_png(mask.astype(np.uint8) * 255, options.out / f"{name}_segmentation.png")
    if variance is not None:
        # 0.25 is the largest variance that a probability can have.
        grey = np.round(resize_map(variance, size) / 0.25 * 255).astype(np.uint8)
        save_png(grey, options.out / "uncertainty" / f"{name}_uncertainty.png")
    if options.overlay:
        with open_picture(path) as picture:
            pixels = np.array(upright(picture).convert("RGB"))
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

    Returns a list of Result, and a list of UserError, one for each image that could not be read."""
    results, unreadable = [], []
    room = Room(PIXELS)
    largest = max(map(pixels_of, itertools.islice(images, BATCH)), default=0)
    workers = min(cores(), max(2, PIXELS // max(largest, 1)))  # a waiting thread, too, keeps some memory

    def read_one(path):
        with room.take(pixels_of(path)):
            return read(path, settings)

    def save_one(row):
        with room.take(row[1][0] * row[1][1]):
            return save_results(*row, options)

    with progress_bar() as progress:
        task = progress.add_task("images", total=len(images))

        def readable():
            for path, image, size in map_in_order(read_one, images, workers):
                if size is None:
                    unreadable.append(image)
                    progress.advance(task)
                else:
                    yield path, image, size

        rows = (row for batch in in_batches(readable()) for row in predict_batch(model, settings, batch, options))
        for result in map_in_order(save_one, rows, workers):
            results.append(result)
            progress.advance(task)
    return results, unreadable


# ---------------------------------------------------------------------------------------------------------- the report


def mean_intervals(values):
    """The means of values (M, N) over N images, with 95 % bootstrap intervals: three arrays (M,), mean, low and high.
    Low and high are NaN for a single image."""
    mean = values.mean(1)
    if values.shape[1] == 1:
        return mean, mean * np.nan, mean * np.nan
    # In batches, because all resamples at once would need half a megabyte per image.
    found = bootstrap((values,), np.mean, axis=1, method="percentile", n_resamples=9999, batch=100, rng=0)
    return mean, *found.confidence_interval


def report_ratings(results, out):
    """Print the mean of each metric with its interval, and write each image's metrics to out/metrics.csv."""
    without = [result.name for result in results if result.rating is None]
    if without:
        some = first_of(without, 10)
        print(f"not evaluated (no true mask): {len(without)} images ({some})")
    rated = {result.name: result.rating for result in results if isinstance(result.rating, dict)}
    if not rated:
        print("no image could be evaluated")
        return
    names = list(next(iter(rated.values())))
    rows = [list(rating.values()) for rating in rated.values()]
    write_csv(out / "metrics.csv", ["id", *names], [(id, *row) for id, row in zip(rated, rows)])
    print(f"{f'evaluated: {len(rated)}':<20}{'mean':>8}   95 % bootstrap interval over the images")
    for name, mean, low, high in zip(names, *mean_intervals(np.array(rows).T)):
        interval = "no interval for a single image" if np.isnan(low) else f"{low:.4f} to {high:.4f}"
        print(f"{name.replace('_', ' '):<20}{mean:8.4f}   {interval}")
    print(f"{out}/metrics.csv: the metrics of each image")
    curves = [result.curve for result in results if result.curve]
    if curves:
        means = np.mean(curves, 0)
        print("threshold  Dice", *(f"{t:9.2f}  {mean:.4f}" for t, mean in zip(THRESHOLDS, means)), sep="\n")
        print(f"best for these images: --threshold {THRESHOLDS[means.argmax()]:g}; evaluate it on other images")


def report_uncertainty(results, out):
    """Write out/scores.csv, and print on which images specialists are likely to disagree."""
    scores = [(result.name, result.uncertainty, result.agreement) for result in results]
    write_csv(out / "scores.csv", ["name", "uncertainty", "agreement"], scores)
    print(f"{out}: a map of each image, and scores.csv")
    if disputed := [result.name for result in results if result.agreement < LIKELY_DISPUTED]:
        some = first_of(disputed, 10)
        print(
            f"specialists are likely to disagree on {len(disputed)} of {len(results)} images (expected agreement below "
            f"{LIKELY_DISPUTED}): {some}; have two people look at them"
        )


def warn_of_truths(results, truths):
    """Print warnings about true masks that may be inverted or turned. truths: a dict of name to the mask's path."""
    unclear = [result.name for result in results if result.unclear]
    turned = [str(truths[result.name]) for result in results if result.turned]
    some = first_of(turned, 10)
    fits = f"{some}: fits the prediction far better if drawn on the picture before its turn by EXIF; turn the mask"
    covers = [(result.name, *result.cover) for result in results if result.cover]
    for warning in (inverted_warning(covers), turned_warning(unclear), fits if turned else None):
        if warning:
            print_warning(warning)


def read_arguments():
    """Read the command line and check what can be checked without reading an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image files and folders of images")
    add("--weights", metavar="FILE", help="a model.weights.h5 that train.py wrote (default: the best one in weights/)")
    add("--out", type=Path, default="masks", metavar="DIR", help="the folder for the masks (default %(default)s)")
    add(
        "--recursive",
        action="store_true",
        help="search subfolders too; the mask of sub/x.jpg is sub__x_segmentation.png",
    )
    add("--overlay", action="store_true", help="draw the mask's outline on the image")
    add("--uncertainty", action="store_true", help="write maps (white: 0.25) and scores.csv (--distance inside)")
    add("--passes", type=int, metavar="T", help="Monte Carlo passes for --uncertainty (default 20)")
    add("--truth", type=Path, metavar="DIR", help="true masks, NAME_segmentation.png: evaluate the masks")
    add("--tta", action="store_true", help="average the predictions of the image and its three mirrored versions")
    add("--largest", action="store_true", help="keep only the mask's largest connected part and fill its holes")
    add("--threshold", type=float, default=0.5, metavar="X", help="pixels above X are lesion (default %(default)s)")
    add("--try-thresholds", action="store_true", help="with --truth: print the Dice at thresholds of 0.05 to 0.95")
    add("--precision", default="float32", choices=PRECISIONS, help="the network's precision (default float32)")
    args = parser.parse_args()
    if args.passes and not args.uncertainty:
        raise UserError(f"--passes {args.passes}: only --uncertainty uses passes; add --uncertainty")
    args.passes = 20 if args.passes is None else args.passes
    if not 1 <= args.passes < 2**31:
        raise UserError(f"--passes {args.passes}: must be at least 1 and below 2**31")
    if not 0 < args.threshold < 1:
        raise UserError(f"--threshold {args.threshold}: must lie between 0 and 1")
    if args.try_thresholds and not args.truth:
        raise UserError("--try-thresholds needs true masks; add --truth DIR")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is not a folder; give a folder for the masks")
    if args.truth and args.truth.resolve() == args.out.resolve():
        raise UserError(f"--truth {args.truth}: the masks in --out would overwrite the true masks; give another --out")
    return args


def main():
    """The command line."""
    args = read_arguments()
    skipped = [path for path in (args.out, args.truth) if path and path not in map(Path, args.inputs)]
    images, left_out = find_images(args.inputs, args.recursive, skipped)
    weights = find_weights(args.weights)
    spare_masks(images.values(), args.out)
    truths = {}
    if args.truth:
        truths, others = find_truths(args.truth, images, args.recursive, [args.out])
        used = {str(path) for path in truths.values()}
        left_out = list({item.path: item for item in left_out + others if item.path not in used}.values())
    from devices import tensorflow_errors, use_devices  # here, because TensorFlow takes seconds to import
    from unet import load_unet

    use_devices()
    with tensorflow_errors():
        model, settings = load_unet(weights, args.precision)
    passes = args.passes if args.uncertainty else 0
    options = Options(
        args.out, args.threshold, args.tta, args.largest, passes, args.overlay, truths, args.try_thresholds, images
    )
    with tensorflow_errors():
        results, errors = predict_all(images, model, settings, options)
    unreadable = f"; {len(errors)} images could not be read" if errors else ""
    print(f"{args.out}: {len(results)} masks by {weights}, threshold {args.threshold:g}{unreadable}")
    if args.uncertainty and results:
        report_uncertainty(results, args.out / "uncertainty")
    if args.truth:
        report_ratings(results, args.out)
        warn_of_truths(results, {images[path]: mask for path, mask in truths.items()})
        errors += [result.rating for result in results if isinstance(result.rating, UserError)]
    if results:
        what = "/overlay: the" if args.overlay else ": white is lesion; --overlay draws the"
        print(f"look at {args.out}{what} outline on each image")
    if left_out:
        print(printable(left_out_line(left_out)))
    for error in errors:
        print_error(error)
    return 2 if errors else 0


if __name__ == "__main__":
    run_command(main)
