"""Predicts masks: NAME_segmentation.png at the image's own size, 0 and 255, as the ISIC challenge expects them.

    python predict.py photo.jpg                                     # best weights of weights/, output in masks/
    python predict.py photo.jpg folder/ --weights runs/NAME/iteration_09/model.weights.h5 --out masks
    python predict.py folder/ --weights ... --uncertainty --overlay # also writes uncertainty maps and outlines
    python predict.py folder/ --weights ... --truth true_masks/     # also evaluates the masks
    python predict.py folder/ --weights ... --cluster auto          # on several machines: docs/scale.md

If it is stopped, the same command goes on where it was.
Masks and metrics.csv go to OUT, uncertainty maps and scores.csv to OUT/uncertainty, outlines to OUT/overlay.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from cluster import Job, connected, stamps
from config import PRECISIONS, add_cluster_options, cluster_options
from pictures import (
    inverted_warning,
    left_out_line,
    list_images,
    match_masks,
    turned_warning,
)
from prediction import BATCH, THRESHOLDS, Options, Record, as_row, from_row, is_ours, predict_all
from utils import (
    LIKELY_DISPUTED,
    UserError,
    composed,
    first_of,
    print_error,
    print_warning,
    printable,
    run_command,
    track,
    write_csv,
)

SHIPPED = [Path(__file__).parent / "weights" / f"{name}.weights.h5" for name in ("best", "paper")]  # the best first
BEST = {"tta": True, "largest": True}  # its defaults, chosen in trials over folds by origin (weights/README.md)


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


def spare_masks(names, out):
    """Raise UserError if a mask in `out` that this program did not write would be overwritten."""
    for name in names:
        mask = out / f"{name}_segmentation.png"
        if mask.exists() and not is_ours(mask):
            raise UserError(f"{mask}: predict.py did not write it and would overwrite it; give another --out")


def find_weights(given):
    """The path `given`, or that of the best shipped weights if it is None. Raises UserError if there are none."""
    found = [Path(given)] if given is not None else [path for path in SHIPPED if path.exists()]
    if not found:
        raise UserError("--weights is needed, because weights/ has none; give a model.weights.h5 that train.py wrote")
    return found[0]


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
    switch, usual = argparse.BooleanOptionalAction, "default: only for the best weights of weights/"
    add("--tta", action=switch, help=f"average the predictions of the image and its three mirrored versions ({usual})")
    add("--largest", action=switch, help=f"keep only the mask's largest connected part, fill its holes ({usual})")
    add("--threshold", type=float, default=0.5, metavar="X", help="pixels above X are lesion (default %(default)s)")
    add("--try-thresholds", action="store_true", help="with --truth: print the Dice at thresholds of 0.05 to 0.95")
    add("--precision", default="float32", choices=PRECISIONS, help="the network's precision (default float32)")
    add_cluster_options(parser, "predict the images")
    args = parser.parse_args()
    args.where = cluster_options(vars(args))
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


def predict_images(images, weights, options, args):
    """Write the results of all images. Returns the Result, or the UserError if it cannot be read, of each one."""
    from devices import tensorflow_errors, use_devices  # here, because TensorFlow takes seconds to import
    from unet import load_unet

    use_devices()
    with tensorflow_errors():
        network = load_unet(weights, args.precision)
    command = args.precision, str(weights.resolve()), weights.stat().st_mtime_ns
    record = Record(command, [*images, *options.truths.values()], options)
    with connected(*args.where) as cluster, tensorflow_errors():
        found = record.done(images.values())
        if found:
            print(f"{len(found)} of {len(images)} images were done before", file=sys.stderr)
        rest = dict(itertools.islice(images.items(), len(found), None))
        if cluster:
            rows = on_cluster(cluster, rest, network, options, args, record)
        else:
            new = track(predict_all(rest, *network, options), "images", len(rest))
            rows = (as_row(name, one, options) for name, one in zip(rest.values(), new))
        for row in rows:
            record.add(row)
            found.append(from_row(row))
    record.remove()
    return found


def on_cluster(cluster, images, network, options, args, record):
    """Yield the row of each image, from the workers of a cluster, in order."""
    (model, settings), paths = network, list(images)
    few = dataclasses.replace(options, truths={}, names={})
    task = {"settings": settings, "options": few, "precision": args.precision, "weights": model.get_weights()}
    folders = {str(path if path.is_dir() else path.parent) for path in map(Path, args.inputs)}
    record.make()
    shared = {str(record.path): None, **stamps(*folders, *([args.truth] if args.truth else []))}

    def arguments(_, piece):
        truths = {path: options.truths[path] for path in piece if path in options.truths}
        return {path: (images[path], path.exists()) for path in piece}, truths

    job = Job(("prediction", "Predicting"), task, "images", arguments, shared)
    pieces = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    return itertools.chain.from_iterable(cluster.in_order(job, pieces))


def main():
    """The command line."""
    args = read_arguments()
    written = args.out, args.out / "overlay", args.out / "uncertainty"
    skipped = [path for path in (*written, args.truth) if path and path not in map(Path, args.inputs)]
    images, left_out = find_images(args.inputs, args.recursive, skipped)
    weights = find_weights(args.weights)
    spare_masks(images.values(), args.out)
    truths = {}
    if args.truth:
        truths, others = find_truths(args.truth, images, args.recursive, [args.out])
        used = {str(path) for path in truths.values()}
        left_out = list({item.path: item for item in left_out + others if item.path not in used}.values())
    passes = args.passes if args.uncertainty else 0
    how = dict(BEST) if weights.resolve() == SHIPPED[0].resolve() else {}
    how |= {name: getattr(args, name) for name in ("tta", "largest") if getattr(args, name) is not None}
    own = {"passes": passes, "overlay": args.overlay, "try_thresholds": args.try_thresholds}
    options = Options(args.out, args.threshold, **how, **own, truths=truths, names=images)
    found = predict_images(images, weights, options, args)
    results, errors = ([one for one in found if isinstance(one, UserError) == failed] for failed in (False, True))
    unreadable = f"; {len(errors)} images could not be read" if errors else ""
    made = ", ".join([f"threshold {args.threshold:g}", *(f"--{name}" for name in how if how[name])])
    print(f"{args.out}: {len(results)} masks by {weights}, {made}{unreadable}")
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
