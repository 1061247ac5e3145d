"""Masks for images: NAME_segmentation.png at the image's own size, 0 and 255, as the ISIC challenge wants them.

    python predict.py photo.jpg folder/ --weights runs/NAME/iteration_09/model.weights.h5 --out masks
    python predict.py folder/ --weights ... --out masks --uncertainty --overlay

Masks go to OUT, uncertainty maps and scores.csv to OUT/uncertainty, outlines on the images to OUT/overlay.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage.segmentation import find_boundaries

from ceal import uncertainty_score
from data import normalise, open_picture, read_image
from unet import PRECISIONS, load_unet, mc_dropout, print_devices
from utils import UserError, map_in_order, print_error, progress_bar, run_command, whole_file, write_csv

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
NOT_AN_IMAGE = ("_superpixels", "_segmentation")  # what ISIC's folders hold beside the images
BATCH = 16


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


def read(path, settings):
    """(path, image at the network's size, original (height, width)), or (path, UserError, None)."""
    try:
        return path, *read_image(path, settings["height"], settings["width"], settings["channels"])
    except UserError as error:
        return path, error, None


def resize_map(values, size):
    """A float32 map (H, W) at the size (height, width), linearly interpolated."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))


def save_png(pixels, path):
    """Write uint8 pixels, whole or not at all."""
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial)


def save_results(out, path, size, prediction, variance, mean, overlay):
    """Write what was asked for about one image: prediction, variance and mean (or None) are float32 maps (H, W).

    Returns its name and its uncertainty score, or None.
    """
    mask = resize_map(prediction, size) > 0.5
    save_png(mask.astype(np.uint8) * 255, out / f"{path.stem}_segmentation.png")
    if variance is not None:
        # 0.25 is the largest variance that a probability can have.
        grey = np.round(resize_map(variance, size) / 0.25 * 255).astype(np.uint8)
        save_png(grey, out / "uncertainty" / f"{path.stem}_uncertainty.png")
    if overlay:
        with open_picture(path) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        pixels[find_boundaries(mask, mode="thick")] = 0, 255, 255
        save_png(pixels, out / "overlay" / f"{path.stem}_overlay.png")
    return path.stem, variance if variance is None else uncertainty_score(variance, mean)


def predict_batch(model, settings, batch, passes):
    """Rows (path, original size, prediction, variance, mean) for a list of (path, image, original size); the last
    two are of `passes` Monte Carlo passes, or None if there are none."""
    paths, images, sizes = zip(*batch)
    images, normalisation = np.stack(images), {name: settings[name] for name in ("mean", "std")}
    prediction = model.predict_on_batch(normalise(images, **normalisation))[..., 0]
    mean = variance = [None] * len(batch)
    if passes:
        mean, variance = mc_dropout(model, images, passes, seed=0, **normalisation)
    return zip(paths, sizes, prediction, variance, mean)


def in_batches(items):
    """Lists of up to BATCH items."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


def predict_all(images, model, settings, out, passes, overlay):
    """Write the results of every image, reading, predicting and writing at the same time.

    Returns the scores, a list of (name, score), and what could not be read, a list of UserError."""
    scores, bad = [], []
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(images))

        def readable():
            for path, image, size in map_in_order(lambda path: read(path, settings), images):
                if size is None:
                    bad.append(image)
                    progress.advance(task)
                else:
                    yield path, image, size

        rows = (row for batch in in_batches(readable()) for row in predict_batch(model, settings, batch, passes))
        for score in map_in_order(lambda row: save_results(out, *row, overlay), rows):
            scores.append(score)
            progress.advance(task)
    return scores, bad


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files and folders of images")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a model.weights.h5 that train.py wrote")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder for the masks")
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help="maps (white: variance 0.25) and scores.csv (--distance inside)",
    )
    parser.add_argument("--overlay", action="store_true", help="the mask's outline drawn on the image")
    parser.add_argument("--passes", type=int, default=20, help="Monte Carlo passes of --uncertainty (default 20)")
    parser.add_argument(
        "--precision", default="float32", choices=PRECISIONS, help="what the network computes in (default float32)"
    )
    args = parser.parse_args()
    if not 1 <= args.passes < 2**31:
        raise UserError(f"--passes {args.passes}: must be at least 1, and below 2**31")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; give the name of a folder for the masks")
    images = find_images(args.inputs)
    print_devices()
    model, settings = load_unet(args.weights, args.precision)
    passes = args.passes if args.uncertainty else 0
    scores, bad = predict_all(images, model, settings, args.out, passes, args.overlay)
    if args.uncertainty and scores:
        write_csv(args.out / "uncertainty" / "scores.csv", ["name", "uncertainty"], scores)
    for error in bad:
        print_error(error)
    print(f"{args.out}: {len(images) - len(bad)} masks" + (f"; {len(bad)} images could not be read" if bad else ""))
    return 2 if bad else 0


if __name__ == "__main__":
    run_command(main)
