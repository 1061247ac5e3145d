"""Measure the speed and the memory of this program on this machine, mostly as ratios within one run.

    python bench.py                # the paper's network, 192x240, T = 20: about 10 minutes on 2 cores
    python bench.py --quick        # fewer repetitions: under 2 minutes
    python bench.py --scale        # large pools, and workers of a Ray cluster: 12 minutes
    python bench.py --preset quick --data datasets/isic2017_96x128.h5 --weights runs/NAME/iteration_09/model.weights.h5

Functions that are compared run in turns (A B A B ...), and the table has medians, so that changes in the machine's
speed do not matter. The last column is the target on 2 CPU cores at the paper's sizes, if there is one.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

import ceal
import data
from bench_scale import SETTINGS, bench_scale
from config import DEMO_SIZE, PRESETS, Config
from devices import about_tensorflow, on_gpu, share_out, tensorflow_errors, tf, use_devices
from prediction import Options, in_batches, predict_all, predict_batch, read, save_results
from run_folder import environment
from sampler import mc_dropout
from synthetic import draw_lesion
from trainer import Trainer
from unet import LEVELS, PRECISIONS, build_unet, load_unet, save_unet
from utils import UserError, map_in_order, read_csv, run_command, segmentation_metrics, track, whole_file

SMALL = (64, 80, 1)  # the size of images if only their number matters
MEGAPIXELS = [(2000, 3000), (2448, 3264), (3000, 4000), (4000, 6000)]  # 6, 8, 12 and 24


def in_turns(functions, rounds):
    """Median seconds of each function of a dict. They run in turns, and the first turn does not count."""
    seconds = {name: [] for name in functions}
    for turn in track(range(rounds + 1), ", ".join(functions)):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def row(what, value, unit, target=""):
    """Print a line of the table. Returns it as a dict."""
    print(f"| {what} | {value:.4g} {unit} | {target} |", flush=True)
    return {"what": what, "value": value, "unit": unit, "target": target}


# ------------------------------------------------------------------------------------------------ Monte Carlo dropout


def multiplications(model, passes):
    """The number of multiplications of the fast sampler for all passes of an image."""
    total = 0
    for layer in model.layers:
        if not hasattr(layer, "kernel"):
            continue
        part, level, letter = f"{layer.name}__".split("_")[:3]
        pixels = np.prod(layer.output.shape[1:3])
        height, width, inputs, outputs = layer.kernel.shape
        if (part, letter) == ("decoder", "a"):
            skip = model.get_layer(f"encoder_{level}_b").filters
            # A pixel of the large map needs 3x3 pixels of the skip connection once, and 2x2 of the small map per pass.
            total += pixels * outputs * (9 * skip + passes * 4 * (inputs - skip))
        else:
            total += pixels * height * width * inputs * outputs * (passes if part in ("decoder", "probability") else 1)
    return int(total)


def bench_sampler(config, batch, rounds):
    """Time the published way, the whole network on a batch, the fast sampler, and a matrix product."""
    passes, side = config.passes, 4096
    precisions = [name for name in PRECISIONS if name != "float16"]  # a CPU emulates it
    models = {name: build_unet(*batch.shape[1:], config.filters, precision=name) for name in precisions}
    network, matrix = models["float32"], tf.random.normal((side, side))
    inputs = data.normalise(batch, 128, 50)
    whole = tf.function(lambda x: network(x, training=False))
    product = tf.function(lambda a: tf.matmul(a, a))
    functions = {
        "published": lambda: [network.predict(inputs[n : n + 1], verbose=0) for n in range(4)],
        "whole": lambda: whole(inputs).numpy(),
        "matmul": lambda: product(matrix)[0, 0].numpy(),
    }
    for name, model in models.items():
        functions[name] = lambda model=model: mc_dropout(model, batch, passes, seed=1, mean=128, std=50)
    seconds = in_turns(functions, rounds)
    seconds = {
        name: value / {"published": 4, "whole": len(batch)}.get(name, len(batch) * passes)
        for name, value in seconds.items()
    }
    peak = 2 * side**3 / (seconds["matmul"] * len(batch) * passes)
    reached = 2 * multiplications(network, passes) / passes / seconds["float32"]

    rows = [
        row("the published way, one `predict` per image and pass", 1000 * seconds["published"], "ms a pass"),
        row(f"the whole network on a batch of {len(batch)}", 1000 * seconds["whole"], "ms a pass"),
    ]
    for name in precisions:
        target = {"float32": "4.5", "bfloat16": "8"}.get(name, "")
        rows.append(row(f"fast sampler, {name}", 1000 * seconds[name], "ms a pass"))
        rows.append(row("... against the published way", seconds["published"] / seconds[name], "times", target))
    return [
        *rows,
        row("fast sampler, float32, against the whole network", seconds["whole"] / seconds["float32"], "times", "2.5"),
        row("matrix product of 4096x4096, float32", peak / 1e9, "GFLOP/s"),
        row("fast sampler's arithmetic, float32, against that", 100 * reached / peak, "%", "70 %"),
    ]


# --------------------------------------------------------------------------------------------------------- on a GPU


def bytes_of_a_pass(model):
    """The fewest bytes that a pass moves in bfloat16: both maps of each decoder level, written and read once, and the
    half of its skip connection, read once."""
    maps = [np.prod(model.get_layer(f"decoder_{level}_a").output.shape[1:]) for level in range(LEVELS)]
    return 5 * 2 * int(sum(maps))


def bench_gpu_peaks():
    """Measure the two ceilings: bfloat16 matrix products, and copies in memory. Returns rows; in FLOP/s and bytes/s."""
    side, numbers, times = 8192, 2**28, 10
    matrix, array = tf.cast(tf.random.normal((side, side)), tf.bfloat16), tf.zeros([numbers])

    @tf.function
    def product(x):
        for _ in range(times):
            x = tf.matmul(x, matrix) * tf.constant(0.01, x.dtype)
        return x[0, 0]

    @tf.function
    def copies(x, count):
        for _ in tf.range(count):  # a loop, because TensorFlow would add the numbers up
            x += 1.0
        return x[0]

    functions = {
        "product": lambda: product(matrix).numpy(),
        "few": lambda: copies(array, tf.constant(times)).numpy(),
        "many": lambda: copies(array, tf.constant(5 * times)).numpy(),
    }
    seconds = in_turns(functions, 3)
    copied = 4 * times * 8 * numbers / (seconds["many"] - seconds["few"])
    peaks = 2 * side**3 * times / seconds["product"], copied
    return [
        row("matrix product of 8192x8192, bfloat16", peaks[0] / 1e12, "TFLOP/s"),
        row("copy in the GPU's memory, bytes read and written", peaks[1] / 1e12, "TB/s"),
    ]


def bench_gpu_sampler(trainer, images, rounds):
    """Time the published way and the fast sampler in each precision, and compare it with its floors."""
    config, size = trainer.config, images.shape[1:]
    inputs, passes = data.normalise(images[:10], 128, 50), config.passes
    models = {name: build_unet(*size, config.filters, precision=name) for name in PRECISIONS}
    options = {"mean": 128, "std": 50, "xla": True, "batch_size": trainer.batch}
    functions = {"published": lambda: [models["float32"].predict(one[None], verbose=0) for one in inputs]}
    for name, model in models.items():
        functions[name] = lambda model=model: mc_dropout(model, images, passes, seed=1, **options)
    seconds = in_turns(functions, rounds)
    published = seconds.pop("published") / len(inputs)
    rows = [row("the published way, one `predict` per image and pass", 1e6 * published, "us a pass")]
    for name, value in seconds.items():
        a_pass = value / len(images) / passes
        rows.append(row(f"fast sampler, {name}, batches of {trainer.batch}", 1e6 * a_pass, "us a pass"))
        rows.append(row("... against the published way", published / a_pass, "times", "300" * (name == "bfloat16")))
    peaks = bench_gpu_peaks()
    operations = 2 * multiplications(models["bfloat16"], passes) / passes
    floors = operations / peaks[0]["value"] / 1e12, bytes_of_a_pass(models["bfloat16"]) / peaks[1]["value"] / 1e12
    a_pass = seconds["bfloat16"] / len(images) / passes
    return [
        *rows,
        *peaks,
        row("floor of a pass: its arithmetic", 1e6 * floors[0], "us"),
        row("floor of a pass: its maps in memory", 1e6 * floors[1], "us"),
        row("the larger floor against a pass in bfloat16", 100 * max(floors) / a_pass, "%", "25 %"),
    ]


# ---------------------------------------------------------------------------------------------- scoring and training


def bench_scoring(trainer, count, rounds):
    """Time the scoring of a pool from its file, and only its passes on images in memory."""
    pool = ceal.Pool([], [], np.arange(count), [])
    images = trainer.dataset.images(pool.unlabelled)

    def alone():
        trainer.uncertainty(pool.unlabelled, 1, images)

    seconds = in_turns({"scoring": lambda: trainer.score(pool, 1), "passes alone": alone}, rounds)
    beside = 100 * (seconds["scoring"] / seconds["passes alone"] - 1)
    return [
        row(f"scoring {count:,} images from the file", seconds["scoring"], "s", "3 s for 1,000 on a GPU" * on_gpu()),
        row("... a second", count / seconds["scoring"], "images"),
        row("scoring time beside the passes", beside, "%", "10 %" if on_gpu() else "below 5 %"),
    ]


def bench_training(trainer, steps, rounds):
    """Time training with augmentation from the file, and only the compiled step on one batch in memory."""
    size, strategy = trainer.config.batch_size, trainer.model.distribute_strategy
    trainer.config.initial_steps = steps * (rounds + 1) + 1
    positions = np.arange(size * 20) % len(trainer.dataset)
    batches = iter(trainer.batches(positions, list(trainer.dataset.masks(positions)), 0))
    constant = next(batches)

    def train_on(some):
        for batch in some:
            trainer.step(*share_out(strategy, *batch))
        trainer.model.get_weights()  # waits until a GPU has finished

    functions = {
        "training": lambda: train_on(itertools.islice(batches, steps)),
        "bare step": lambda: train_on([constant] * steps),
    }
    if not on_gpu():
        plain_step = tf.function(lambda *batch: trainer.model.train_step(batch))
        functions["Keras' step"] = lambda: [plain_step(*constant) for _ in range(steps)]
    seconds = in_turns(functions, rounds)
    share = 100 * seconds["bare step"] / seconds["training"]
    rows = [
        row("training, a second", size * steps / seconds["training"], "images"),
        row("training against its bare step", share, "%", "90 %" if on_gpu() else "95 %"),
    ]
    if not on_gpu():
        rows.append(row("bare step against Keras' own", seconds["Keras' step"] / seconds["bare step"], "times"))
    return rows


def bench_precision(path, dataset, count, passes):
    """Compare scores and Dice of trained weights in half precision with those in float32."""
    positions = np.flatnonzero(dataset.part == "train")[:count]
    images, masks, found = dataset.images(positions), dataset.masks(positions), {}
    for name in ["float32", "TF32", *list(PRECISIONS)[1:]] if on_gpu() else PRECISIONS:
        tf.config.experimental.enable_tensor_float_32_execution(name == "TF32")
        model, settings = load_unet(path, "float32" if name == "TF32" else name)
        if model.input_shape[1:] != images.shape[1:]:
            raise UserError(f"{path} is for another image size than {dataset.path}: give other --weights or --data")
        normalisation = {key: settings[key] for key in ("mean", "std")}
        mean, variance = mc_dropout(model, images, passes, seed=1, keys=positions, **normalisation)
        scores = [ceal.uncertainty_score(v, m) for v, m in zip(variance, mean)]
        found[name] = scores, segmentation_metrics(masks, mean > 0.5)["dice"].mean()
    tf.config.experimental.enable_tensor_float_32_execution(True)  # as by default
    rows = []
    for name in list(found)[1:]:
        rank = spearmanr(found["float32"][0], found[name][0]).statistic
        rows.append(row(f"{name}: rank correlation of {len(positions)} scores with float32's", rank, ""))
        rows.append(
            row(f"{name}: Dice of the mean of the passes minus float32's", found[name][1] - found["float32"][1], "")
        )
    return rows


# -------------------------------------------------------------------------------------------- reading and predicting


def write_photographs(folder, sizes):
    """Write lesions of these (height, width) as JPEG files with masks, in the challenge's layout; return the folder."""
    images, masks = folder / "ISIC-2017_Training_Data", folder / "ISIC-2017_Training_Part1_GroundTruth"
    images.mkdir(parents=True)
    masks.mkdir()
    for n, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(n)
        small, mask = draw_lesion(rng, height // 4, width // 4)
        large = np.asarray(Image.fromarray(small).resize((width, height)))
        grain = rng.integers(0, 12, (height, width, 1), np.uint8)  # without noise, decoding would be too fast
        Image.fromarray(np.minimum(large, 243) + grain).save(images / f"ISIC_{n:07d}.jpg", quality=92)
        mask = Image.fromarray(mask * 255).resize((width, height), Image.Resampling.NEAREST)
        mask.save(masks / f"ISIC_{n:07d}_segmentation.png")
    return images


def exhaust(items):
    """Iterate to the end, and discard the items."""
    for _ in items:
        pass


def bench_reading(folder, rounds):
    """Time `data.py isic` on photographs of 6 to 24 megapixels, and only their decoding, images at reduced scale."""
    write_photographs(folder, MEGAPIXELS)
    pairs, size = data.find_pairs(folder)[0] * 6, (192, 240, 1)
    pairs = [pair._replace(id=f"BENCH_{n:07d}") for n, pair in enumerate(pairs)]

    def decode(pair):
        with Image.open(pair.image) as image, Image.open(pair.mask) as mask:
            image.draft("L", size[1::-1])
            image.load()
            mask.load()

    def read():
        rows = map_in_order(lambda pair: data.read_pair(pair, *size), pairs)
        data.write_dataset(folder / "out.h5", rows, len(pairs), *size, "bench", force=True)

    seconds = in_turns({"reading": read, "decoding alone": lambda: exhaust(map_in_order(decode, pairs))}, rounds)
    return [
        row("data.py isic on 6 to 24 megapixels, a second", len(pairs) / seconds["reading"], "pairs"),
        row("data.py isic against decoding alone", 100 * seconds["decoding alone"] / seconds["reading"], "%", "80 %"),
    ]


def bench_predicting(config, size, folder, count, rounds):
    """Time `predict.py` on a folder of photographs of 1.5 megapixels, and each of its parts."""
    photographs = sorted(write_photographs(folder, [(1024, 1536)] * count).iterdir())
    model = build_unet(*size, config.filters)
    settings = dict(zip(("height", "width", "channels", "mean", "std"), (*size, 128.0, 50.0)))
    pictures = [read(path, settings) for path in photographs]
    options = Options(folder / "out")
    rows = list(predict_batch(model, settings, pictures, options))
    functions = {
        "predict.py": lambda: exhaust(predict_all(photographs, model, settings, options)),
        "reading": lambda: exhaust(map_in_order(lambda path: read(path, settings), photographs)),
        "network": lambda: [predict_batch(model, settings, batch, options) for batch in in_batches(pictures)],
        "writing": lambda: exhaust(map_in_order(lambda row: save_results(*row, options), rows)),
    }
    seconds = in_turns(functions, rounds)
    total, slowest = seconds.pop("predict.py"), max(seconds, key=seconds.get)
    return [
        row("predict.py on 1.5 megapixels, a second", count / total, "images"),
        row(f"... against its slowest part alone, {slowest}", total / seconds[slowest], "times", "at most 1.2"),
    ]


# ------------------------------------------------------------------------------------- memory and time against numbers


# A small process starts the script, because Linux counts the memory of the starting process for the started one too.
PEAK_MEMORY = """
import os, subprocess, sys
with open(os.devnull, "w") as nowhere:
    process = subprocess.Popen(sys.argv[1:], stdout=nowhere, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss if status == 0 else error.decode())
sys.exit(status != 0)
"""


def peak_memory(script, *arguments):
    """Run a script of this project in its own process. Returns its peak memory in MB. Raises UserError if it fails."""
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    command = [sys.executable, "-c", PEAK_MEMORY, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} failed: {done.stdout}")
    return int(done.stdout) / (1e6 if sys.platform == "darwin" else 1e3)


def bench_pools(folder, counts):
    """Measure train.py with a tiny network on pools of different sizes: peak memory, and the time to score an image."""
    drawn = [data.draw_row(n, 1, *SMALL) for n in range(20)]
    options = (
        "--filters 4 --passes 2 --initial 8 --test 8 --initial-epochs 1 --active-epochs 1 --iterations 1 --batch-size 4"
    )
    memory, seconds = [], []
    for count in counts:
        path, run = folder / f"{count}.h5", folder / f"run_{count}"
        rows = (drawn[n % 20]._replace(id=f"BENCH_{n:07d}") for n in range(count + 16))
        data.write_dataset(path, rows, count + 16, *SMALL, "bench")
        memory.append(peak_memory("train.py", "--data", path, "--run", run, "--pool", count, *options.split()))
        seconds.append(float(read_csv(run / "history.csv")[-1]["seconds_scoring"]))
    cost = np.diff(seconds) / np.diff(counts)  # seconds per image, without the time to start
    return [
        row(
            f"train.py: memory, a pool of {counts[-1]:,} against {counts[0]:,}",
            memory[-1] / memory[0],
            "times",
            "at most 1.05",
        ),
        row("... memory, the larger one", memory[-1], "MB"),
        *(
            row(f"... time to score an image, above {counts[1]:,} against below", c / cost[0], "times")
            for c in cost[1:]
        ),
    ]


def bench_folders(folder, counts):
    """Measure the peak memory of data.py and predict.py on folders of different sizes."""
    photograph, weights, memory = write_photographs(folder / "one", [(1024, 1536)]), folder / "x.weights.h5", {}
    (image,), (mask,) = photograph.glob("*.jpg"), (folder / "one").glob("*/*.png")
    save_unet(build_unet(*SMALL, filters=4), weights, [128.0], [50.0])
    for count in counts:
        source = folder / str(count)
        for original, name in (image, "ISIC-2017_Training_Data"), (mask, "ISIC-2017_Training_Part1_GroundTruth"):
            (source / name).mkdir(parents=True)
            for n in range(count):
                (source / name / original.name.replace("0000000", f"{n:07d}")).symlink_to(original)
        memory["data.py isic", count] = peak_memory("data.py", "isic", source, folder / f"isic_{count}.h5")
        arguments = source / "ISIC-2017_Training_Data", "--weights", weights, "--out", folder / f"masks_{count}"
        memory["predict.py", count] = peak_memory("predict.py", *arguments)
    few, many = counts
    return [
        row(
            f"{name}: memory, {many:,} images against {few:,}",
            memory[name, many] / memory[name, few],
            "times",
            "at most 1.05",
        )
        for name in ("data.py isic", "predict.py")
    ]


# --------------------------------------------------------------------------------------------------- the command line


def draw_dataset(path, size, count):
    """Write a data file of synthetic lesions, of which 16 differ. Returns its path."""
    drawn = [data.draw_row(n, 1, *size) for n in range(16)]
    rows = (drawn[n % 16]._replace(id=f"BENCH_{n:07d}") for n in range(count))
    data.write_dataset(path, rows, count, *size, "synthetic lesions")
    return path


def measure(args, config, folder):
    """Measure all rows of the table, in order. Returns them as a list of dict."""
    sizes = {"quick": (96, 128, 1), "best": (96, 128, 3), "demo": tuple(DEMO_SIZE.values())}
    size = sizes.get(args.preset, (192, 240, 1))
    rounds, count = (1, 8) if args.quick else (3, 16)
    if on_gpu():
        count = 1000 if size == (192, 240, 1) else 100
    with data.Dataset(args.data or draw_dataset(folder / "images.h5", size, count)) as dataset:
        if len(dataset) < count:
            raise UserError(f"--data {args.data} has {len(dataset)} images: give a file with at least {count}")
        size = dataset.height, dataset.width, dataset.channels
        trainer = Trainer(config, dataset, [128.0] * size[2], [50.0] * size[2])
        if on_gpu():
            rows = bench_gpu_sampler(trainer, dataset.images(np.arange(min(count, 4 * trainer.batch))), rounds)
        else:
            rows = bench_sampler(config, dataset.images(np.arange(8)), 1 if args.quick else 5)
        rows += bench_scoring(trainer, count, rounds)
        rows += bench_training(trainer, 40 if on_gpu() else 1 if args.quick else 4, rounds)
        if args.weights:
            rows += bench_precision(args.weights, dataset, 100 if args.quick else 400, config.passes)
    rows += bench_predicting(config, size, folder / "predicting", min(count, 64), rounds)
    if not on_gpu():  # these depend on the processor and the disk alone
        rows += bench_reading(folder / "reading", rounds)
        rows += bench_pools(folder, [100, 1000] if args.quick else [1000, 5000, 10000])
        rows += bench_folders(folder, [100, 1000] if args.quick else [1000, 10000])
    return rows


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", choices=PRESETS, help="network and passes (default paper)")
    parser.add_argument("--data", metavar="FILE", help="images to use, an HDF5 file of data.py (default: synthetic)")
    parser.add_argument("--weights", metavar="FILE", help="also measure half precision on these weights and --data")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the table and a description of the machine to this file"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller numbers")
    parser.add_argument("--scale", action="store_true", help="measure large pools and a cluster's workers instead")
    args = parser.parse_args()
    if args.scale and args.preset not in SETTINGS and not args.data:
        raise UserError(f"--scale --preset {args.preset}: give one of {', '.join(SETTINGS)}")
    if args.weights and not args.data:
        raise UserError("--weights needs --data, because half precision must be measured on real images: give both")
    use_devices()
    if args.weights:
        with tensorflow_errors():
            load_unet(args.weights)
    if args.json:  # fail now rather than after minutes
        data.check_output(args.json, force=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.json.parent).close()
    about = environment(about_tensorflow())
    print(f"{about.get('gpu') or about['processor']}, {about['cores']} cores, {about['date']}\n")
    print("| what | measured | target, preset paper |\n| --- | ---: | ---: |")
    config = Config(**{**PRESETS[args.preset], "batch_size": 8})
    if on_gpu():
        config.batch_size, config.precision = 32, "bfloat16"
    with tempfile.TemporaryDirectory() as folder, tensorflow_errors():
        rows = (
            bench_scale(row, args.preset, args.quick, args.data) if args.scale else measure(args, config, Path(folder))
        )
    if args.json:
        with whole_file(args.json) as partial:
            partial.write_text(json.dumps({"machine": about, "table": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
