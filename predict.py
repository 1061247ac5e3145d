"""Masks for images: NAME_segmentation.png at the image's own size, 0 and 255, as the ISIC challenge wants them.

    python predict.py photo.jpg                                     # with the best weights of weights/, to masks/
    python predict.py photo.jpg folder/ --weights runs/NAME/iteration_09/model.weights.h5 --out masks
    python predict.py folder/ --weights ... --uncertainty --overlay # what the network is unsure of, and outlines
    python predict.py folder/ --weights ... --truth true_masks/     # how good the masks are

Masks and metrics.csv go to OUT, uncertainty maps and scores.csv to OUT/uncertainty, outlines to OUT/overlay.
"""

import argparse
import dataclasses
import itertools
import operator
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
from pictures import NOT_AN_IMAGE, SUFFIXES, open_picture, read_image, read_mask, resize_map, upright
from utils import (
    UserError,
    composed,
    map_in_order,
    print_error,
    progress_bar,
    run_command,
    segmentation_metrics,
    whole_file,
    write_csv,
)

SHIPPED = [Path(__file__).parent / "weights" / f"{name}.weights.h5" for name in ("best", "paper")]  # the best first
MIRRORS = ((), (1,), (2,), (1, 2))  # the axes of (N, H, W, C) that are reversed; the first: the image as it is
THRESHOLDS = np.arange(1, 20) / 20
BATCH = 16
SOFTWARE = "CEAL predict.py"  # what a PNG of this program says that it was made with


@dataclasses.dataclass
class Options:
    """What is to be done with the images. The defaults are the paper's: masks of the plain prediction, cut at 0.5."""

    out: Path
    threshold: float = 0.5
    tta: bool = False  # the mean over the mirrored images
    largest: bool = False  # keep the largest part, its holes filled
    passes: int = 0  # of Monte Carlo dropout, for the uncertainty; 0: no uncertainty
    overlay: bool = False
    truths: dict = dataclasses.field(default_factory=dict)  # an image's path -> that of its true mask
    try_thresholds: bool = False  # rate the masks cut at THRESHOLDS too


# ------------------------------------------------------------------------------------------------------- what is there


def find_images(inputs):
    """The image files among `inputs` (files and folders), sorted within each folder: a list of Path.

    Raises UserError if an input is missing, holds no image, or two images would have one mask.
    """
    images = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = [path for path in sorted(given.iterdir()) if path.suffix.lower() in SUFFIXES]
            found = [path for path in found if not path.stem.lower().endswith(NOT_AN_IMAGE)]
            found = [path for path in found if not path.name.startswith(".") and not path.is_dir()]
            if not found:
                raise UserError(f"{given}: no image in this folder ({' '.join(sorted(SUFFIXES))})")
            images += found
        elif given.exists():
            images.append(given)
        else:
            raise UserError(f"{given}: there is no such file or folder")
    seen = {}
    for path in images:
        if path.stem in seen:
            raise UserError(f"{seen[path.stem]} and {path} would have the same mask: rename one, or do it separately")
        seen[path.stem] = path
    return images


def find_truths(folder, images):
    """The true masks in `folder`, NAME_segmentation.png or NAME.png in any case: a dict of an image's path to its
    mask's, without the images that have none.

    Raises UserError if the folder is missing or has no image's mask, or if it is not clear whose mask one is.
    """
    if not folder.is_dir():
        raise UserError(f"--truth {folder}: {'is no folder' if folder.exists() else 'there is no such folder'}")
    masks = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".png":
            masks.setdefault(composed(path.stem).lower(), []).append(path)
    truths, owners = {}, {}
    for image in images:
        name = composed(image.stem).lower()
        # NAME.png may be the image itself.
        found = masks.get(f"{name}_segmentation") or [p for p in masks.get(name, []) if p.resolve() != image.resolve()]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both the true mask of {image}: remove one")
        if found:
            truths[image] = found[0]
            if owners.setdefault(found[0], image) != image:
                raise UserError(f"{found[0]} is the true mask of {owners[found[0]]} or of {image}: rename one of them")
    if not truths:
        raise UserError(f"--truth {folder}: no true mask of any image, say {images[0].stem}_segmentation.png")
    return truths


def find_weights(given):
    """The weights file to use: the one given, or else the best one shipped. Raises UserError if none is."""
    found = [Path(given)] if given is not None else [path for path in SHIPPED if path.exists()]
    if not found:
        raise UserError("--weights is needed, a model.weights.h5 that train.py wrote: weights/ has none")
    return found[0]


# --------------------------------------------------------------------------------------------------- image after image


def read(path, settings):
    """(path, image at the network's size, original (height, width)), or (path, UserError, None)."""
    try:
        return path, *read_image(path, settings["height"], settings["width"], settings["channels"])
    except UserError as error:
        return path, error, None


def save_png(pixels, path):
    """Write uint8 pixels, whole or not at all, marked as this program's."""
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
    """The largest part (corners connect) of a bool mask (H, W), its holes filled; an empty mask stays empty."""
    parts = regionprops(label(mask))
    kept = np.zeros_like(mask)
    if parts:
        largest = max(parts, key=operator.attrgetter("area"))
        kept[largest.slice] = binary_fill_holes(largest.image)
    return kept


def spare_masks(images, out):
    """Raise UserError if a mask that this program did not write, perhaps the true one, would be overwritten."""
    for path in images:
        mask = out / f"{path.stem}_segmentation.png"
        if mask.exists() and not is_ours(mask):
            raise UserError(f"{mask}: predict.py did not write it and would overwrite it; give another --out")


def read_truth(path, size):
    """The true mask in a file, uint8 (H, W), of an image of this size. Raises UserError if there is none."""
    true_mask, own_size = read_mask(path, *size)
    if own_size != size:
        sizes = "{}x{} and its image {}x{} rows x columns".format(*own_size, *size)
        raise UserError(f"{path} is {sizes}: not of the same picture, or resized; get or draw the mask again")
    return true_mask


def rate(mask, true_mask):
    """The challenge's metrics, a dict of name to float, of a bool mask (H, W)."""
    return {name: float(values[0]) for name, values in segmentation_metrics(true_mask[None], mask[None]).items()}


class Result(NamedTuple):
    name: str
    uncertainty: float | None  # the score
    rating: dict | UserError | None  # what `rate` said, or why there is none; None: there is no truth
    curve: list  # its Dice at THRESHOLDS, if that was asked for


def save_results(path, size, prediction, variance, mean, options):
    """Write what was asked for about one image: prediction, variance and mean (or None) are float32 maps (H, W).

    Returns its Result.
    """
    probability = resize_map(prediction, size)

    def cut(threshold):
        mask = probability > threshold
        return largest_part(mask) if options.largest else mask

    mask = cut(options.threshold)
    save_png(mask.astype(np.uint8) * 255, options.out / f"{path.stem}_segmentation.png")
    if variance is not None:
        # 0.25 is the largest variance that a probability can have.
        grey = np.round(resize_map(variance, size) / 0.25 * 255).astype(np.uint8)
        save_png(grey, options.out / "uncertainty" / f"{path.stem}_uncertainty.png")
    if options.overlay:
        with open_picture(path) as picture:
            pixels = np.array(upright(picture).convert("RGB"))
        pixels[find_boundaries(mask, mode="thick")] = 0, 255, 255
        save_png(pixels, options.out / "overlay" / f"{path.stem}_overlay.png")
    score = None if variance is None else uncertainty_score(variance, mean)
    rating, curve = None, []
    if path in options.truths:
        try:
            true_mask = read_truth(options.truths[path], size)
            rating = rate(mask, true_mask)
            curve = [rate(cut(t), true_mask)["dice"] for t in THRESHOLDS] if options.try_thresholds else []
        except UserError as error:
            rating = error
    return Result(path.stem, score, rating, curve)


def predict_batch(model, settings, batch, options):
    """Rows (path, original size, prediction, variance, mean) for a list of (path, image, original size); the last
    two are of Monte Carlo passes, or None if none are asked for."""
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
    """Lists of up to BATCH items."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


def predict_all(images, model, settings, options):
    """Write the results of every image, reading, predicting and writing at the same time.

    Returns a list of Result, and what could not be read, a list of UserError."""
    results, unreadable = [], []
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(images))

        def readable():
            for path, image, size in map_in_order(lambda path: read(path, settings), images):
                if size is None:
                    unreadable.append(image)
                    progress.advance(task)
                else:
                    yield path, image, size

        rows = (row for batch in in_batches(readable()) for row in predict_batch(model, settings, batch, options))
        for result in map_in_order(lambda row: save_results(*row, options), rows):
            results.append(result)
            progress.advance(task)
    return results, unreadable


# ---------------------------------------------------------------------------------------------------------- the report


def mean_intervals(values):
    """The means of values (M, N) over N images, and 95 % bootstrap intervals: three arrays (M,), mean, low and high,
    which are NaN for a single image."""
    mean = values.mean(1)
    if values.shape[1] == 1:
        return mean, mean * np.nan, mean * np.nan
    # All resamples at once would take half a megabyte an image.
    found = bootstrap((values,), np.mean, axis=1, method="percentile", n_resamples=9999, batch=100, rng=0)
    return mean, *found.confidence_interval


def report_ratings(results, out):
    """Print the means of the images' metrics with their intervals, and write each image's to out/metrics.csv."""
    without = [result.name for result in results if result.rating is None]
    if without:
        some = ", ".join(without[:10]) + ", ..." * (len(without) > 10)
        print(f"no true mask, and so not rated: {len(without)} images ({some})")
    rated = {result.name: result.rating for result in results if isinstance(result.rating, dict)}
    if not rated:
        print("no image could be rated")
        return
    names = list(next(iter(rated.values())))
    rows = [list(rating.values()) for rating in rated.values()]
    write_csv(out / "metrics.csv", ["id", *names], [(id, *row) for id, row in zip(rated, rows)])
    print(f"{f'rated: {len(rated)}':<20}{'mean':>8}   95 % bootstrap interval over the images")
    for name, mean, low, high in zip(names, *mean_intervals(np.array(rows).T)):
        interval = "none: a single image" if np.isnan(low) else f"{low:.4f} to {high:.4f}"
        print(f"{name.replace('_', ' '):<20}{mean:8.4f}   {interval}")
    print(f"{out}/metrics.csv: the metrics of each image")
    curves = [result.curve for result in results if result.curve]
    if curves:
        means = np.mean(curves, 0)
        print("threshold  Dice", *(f"{t:9.2f}  {mean:.4f}" for t, mean in zip(THRESHOLDS, means)), sep="\n")
        print(f"the best for these images: --threshold {THRESHOLDS[means.argmax()]:g}; rate it on others")


def read_arguments():
    """The command line's arguments, checked as far as they can be without reading an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image files and folders of images")
    add("--weights", metavar="FILE", help="a model.weights.h5 that train.py wrote (default: the best one in weights/)")
    add("--out", type=Path, default="masks", metavar="DIR", help="the folder for the masks (default %(default)s)")
    add("--overlay", action="store_true", help="the mask's outline drawn on the image")
    add("--uncertainty", action="store_true", help="maps (white: variance 0.25) and scores.csv (--distance inside)")
    add("--passes", type=int, metavar="T", help="Monte Carlo passes of --uncertainty (default 20)")
    add("--truth", type=Path, metavar="DIR", help="true masks, NAME_segmentation.png: print and write the metrics")
    add("--tta", action="store_true", help="predict the image's mirrored versions too and take the mean of the four")
    add("--largest", action="store_true", help="keep the mask's largest connected part and fill its holes")
    add("--threshold", type=float, default=0.5, metavar="X", help="lesion is above it (default %(default)s)")
    add("--try-thresholds", action="store_true", help="print the Dice of masks cut at 0.05, 0.1, ...: needs --truth")
    add("--precision", default="float32", choices=PRECISIONS, help="what the network computes in (default float32)")
    args = parser.parse_args()
    if args.passes and not args.uncertainty:
        raise UserError(f"--passes {args.passes}: the masks need none; give --uncertainty for maps and scores")
    args.passes = 20 if args.passes is None else args.passes
    if not 1 <= args.passes < 2**31:
        raise UserError(f"--passes {args.passes}: must be at least 1, and below 2**31")
    if not 0 < args.threshold < 1:
        raise UserError(f"--threshold {args.threshold}: must lie between 0 and 1")
    if args.try_thresholds and not args.truth:
        raise UserError("--try-thresholds: what is best is known where there are true masks; give --truth DIR")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; give the name of a folder for the masks")
    if args.truth and args.truth.resolve() == args.out.resolve():
        raise UserError(f"--truth {args.truth}: the masks of --out would overwrite the true ones; give another --out")
    return args


def main():
    """The command line."""
    args = read_arguments()
    images, weights = find_images(args.inputs), find_weights(args.weights)
    spare_masks(images, args.out)
    truths = find_truths(args.truth, images) if args.truth else {}
    from unet import load_unet, print_devices  # here, because TensorFlow takes seconds to import

    print_devices()
    model, settings = load_unet(weights, args.precision)
    passes = args.passes if args.uncertainty else 0
    options = Options(
        args.out, args.threshold, args.tta, args.largest, passes, args.overlay, truths, args.try_thresholds
    )
    results, errors = predict_all(images, model, settings, options)
    unreadable = f"; {len(errors)} images could not be read" if errors else ""
    print(f"{args.out}: {len(results)} masks by {weights}, cut at {args.threshold:g}{unreadable}")
    if args.uncertainty and results:
        scores = [(result.name, result.uncertainty) for result in results]
        write_csv(args.out / "uncertainty" / "scores.csv", ["name", "uncertainty"], scores)
        print(f"{args.out}/uncertainty: a map of each image, and scores.csv")
    if args.truth:
        report_ratings(results, args.out)
        errors += [result.rating for result in results if isinstance(result.rating, UserError)]
    if results:
        what = "/overlay: the" if args.overlay else ": white is lesion; --overlay draws the"
        print(f"look at {args.out}{what} outline on each image")
    for error in errors:
        print_error(error)
    return 2 if errors else 0


if __name__ == "__main__":
    run_command(main)
