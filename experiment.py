"""The experiment: its arms and regimes, the records of finished runs, and their statistics.

Nothing here starts a run or draws a figure.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy.stats import bootstrap, spearmanr, ttest_1samp

import ceal
from config import read_config
from figures import GROUPS, Curve, Regions
from strategies import STRATEGIES
from utils import UserError, in_one_line, read_csv, whole_file, whole_folder, write_csv

NO_PSEUDO = {"pseudo_first": 0, "pseudo_step": 0}
# The settings that each arm changes.
ARMS = {
    "ceal": {},
    "no_pseudo": NO_PSEUDO,
    "no_distance": {"distance": "none"},
    "empty_only": {"no_detection_rule": "empty"},
    "power": {"query": "power"},
    "uncertain_only": {"no_detection": 0, "random": 0},  # `configure` sets most_uncertain to all queries
    "entropy": {"uncertainty": "entropy"},
    "bald": {"uncertainty": "bald"},
    "random": {"query": "uniform", **NO_PSEUDO},
    "random_pseudo": {"query": "uniform"},
    "no_queries": {"query": "none", **NO_PSEUDO},
    "full_in_stages": {"query": "none", **NO_PSEUDO},
    # The rate is 0 so that records do not differ in a setting that this arm does not use.
    "full": {"iterations": 0, "active_learning_rate": 0.0},
}
# Every strategy that no arm uses yet is an arm of its own name.
ARMS |= {
    name: {"query": name}
    for name in STRATEGIES
    if name not in {changes.get("query", "paper") for changes in ARMS.values()}
}
# The first labels drawn anew for each seed (`configure`), at random or typical ones; then random queries.
ARMS |= {f"{start}_start": {**ARMS["random"], "start": start} for start in ("random", "typical")}
FULL = "full_in_stages", "full"  # all images labelled from the start: the same in both regimes
# Settings in which compared runs may differ, because they do not change a result.
PLACE = "run", "data", "devices", "deterministic"
LINES = ["k-o", "k--s", "b-^", "m-*", "c-h", "b--v", "g-D", "g--P", "r-x", "r--+", "y-.", "k-.", "k:", "m--d", "c--p"]
LINES += ["r-D", "g:s", "y--h"]
STYLES = dict(zip(ARMS, itertools.cycle(LINES)))
REGIMES = "scarce", "paper"
# The columns of a record's pool.csv: what `rate_pool` returns.
POOL = [
    "iteration",
    "pool",
    "correlation",
    "certain_and_poor",
    "most_uncertain_region",
    "certain_and_right",
    "uncertain_region",
    "dice_pool",
    *(f"dice_{group}" for group in GROUPS if group != "audit"),
]
FAILURE = 0.788  # the Dice at a Jaccard index of 0.65, below which the challenge counts a mask as failed


# ----------------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    regime: str
    arm: str
    seed: int

    @property
    def name(self):
        return f"{self.arm}-{self.seed}" if self.arm in FULL else f"{self.regime}-{self.arm}-{self.seed}"

    @classmethod
    def named(cls, name):
        """The run with this `name`; a run of FULL gets the first regime. Raises UserError for any other name."""
        try:
            *regime, arm, seed = name.split("-")
            run = cls(*regime or REGIMES[:1], arm, int(seed))
        except (TypeError, ValueError):
            run = None
        if run is None or run.arm not in ARMS or run.regime not in REGIMES:
            raise UserError(f"{name}: not the name of a record of reproduce.py; move it out of records/")
        return run


def read_seeds(text):
    """The seeds of a text such as 6-10, or 3, a range. Raises ValueError for any other text."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def configure(run, base):
    """The Config of a run. base: the Config that all runs have in common.

    All arms have the same test images, initial weights and number of optimizer steps. All arms except FULL and
    `no_queries` have the same number of annotations. The scarce regime starts with a sixth of the labels. Images for
    --validation come on top of the first labels and are the same in all arms of a regime except FULL.
    """
    labelled, half_way = base.initial + base.pool, base.initial + base.iterations * base.asked // 2
    initial_steps, active_steps = base.training_steps(base.initial, 0), base.training_steps(half_way, 1)
    initial = base.validation + (base.initial if run.regime == "paper" else base.initial // 6)
    changes = dict(ARMS[run.arm])
    if "start" in changes:
        changes["initial_seed"] = run.seed
    if run.arm in FULL:
        initial = labelled
    if run.arm == "full":
        initial_steps += base.iterations * active_steps
    if run.arm == "uncertain_only":
        changes["most_uncertain"] = base.asked
    steps = {"initial_steps": initial_steps, "active_steps": active_steps}
    return dataclasses.replace(base, seed=run.seed, initial=initial, pool=labelled - initial, **steps, **changes)


def common_iterations(run, other, base):
    """How many of the first iterations are the same in two runs, bit for bit on a CPU."""
    if {*FULL} & {run.arm, other.arm} or run[::2] != other[::2] or run == other:
        return 0
    mine, theirs = (dataclasses.replace(configure(r, base), **NO_PSEUDO) for r in (run, other))
    if (mine.start, mine.initial_seed) != (theirs.start, theirs.initial_seed):
        return 0
    return min(base.pseudo_start, base.iterations + 1) if mine == theirs else 1


def different_setting(path, config, ignored=()):
    """A text that names the first setting in which a config.json differs from a Config, or None. ignored: names of
    settings that may differ, besides those of PLACE."""
    stored, wanted = json.loads(path.read_text()), dataclasses.asdict(config)
    for name in wanted:
        of_file = stored.get(name, getattr(type(config), name))  # the file may be older than the setting
        if of_file != wanted[name] and name not in {*PLACE, *ignored}:
            return f"--{name.replace('_', '-')} {of_file}, not {wanted[name]}"
    return None


def read_base(options):
    """The Config that all runs have in common, from options of train.py. Raises UserError if such runs cannot be
    compared."""
    for option in options:
        if option.partition("=")[0] in ("--run", "--seed", "--force", "--query"):
            raise UserError(f"{option}: each run has its own; leave it out, and use --out, --seeds and --arms")
    base = read_config(options)
    if not base.iterations:
        raise UserError("--iterations 0: arms do not differ before the first iteration; give at least 1")
    if (base.validation or base.test) < 2 or base.oracle != "simulated":
        raise UserError(
            "--test or --validation 0 or 1 and --oracle folder do not work here, because arms are compared on these "
            "images and use the masks of the data file; leave them out"
        )
    return base


# -------------------------------------------------------------------------------------------------------------- records


def keep_record(run, folder, out):
    """Copy the results of a finished run, without weights and images, to OUT/records/. Raises UserError if damaged."""
    with whole_folder(out / "records" / run.name) as record:
        for name in "config.json", "environment.json", "history.csv", "quality.csv":
            if name != "quality.csv" or (folder / name).exists():  # earlier versions did not write it
                shutil.copy(folder / name, record)
        with as_written(folder):
            iterations = [folder / f"iteration_{k:02d}" for k, _ in enumerate(read_csv(folder / "history.csv"))]
            tests = [read_csv(iteration / "test.csv") for iteration in iterations]
            rows = list(zip(*([round(float(row["dice"]), 4) for row in test] for test in tests), strict=True))
        header = ["id", *(iteration.name for iteration in iterations)]
        write_csv(record / "test_dice.csv", header, ((row["id"], *dice) for row, dice in zip(tests[0], rows)))
        keep_queries(iterations, record)
        scored = {k: iteration for k, iteration in enumerate(iterations) if (iteration / "scores.csv").exists()}
        if scored:
            keep_pools(scored, record)
        if scored and run.arm == "ceal" and run.seed == 1:  # for the paper's Fig. 1
            for k in {min(scored), max(scored)}:
                shutil.copy(scored[k] / "examples.png", record / f"{scored[k].name}_examples.png")


def keep_queries(iterations, record):
    """Write queries.csv of a record: `iteration, id, group` of every selected image."""
    queries = {k: folder / "queries.csv" for k, folder in enumerate(iterations) if (folder / "queries.csv").exists()}
    rows = [(k, row["id"], row["group"]) for k, path in queries.items() for row in read_csv(path)]
    write_csv(record / "queries.csv", ["iteration", "id", "group"], rows)


def keep_pools(scored, record):
    """Write pool.csv of a record, with a row of `rate_pool` for each scored iteration, and pool_images.npz with the
    score and the Dice of each pool image: `ids` (N,), `iterations` (K,), `score` and `dice`, float32 (K, N), NaN for
    an image that was not in the pool."""
    pools = {k: read_pool(folder) for k, folder in scored.items()}
    edges = region_edges(pools[min(pools)]["score"])
    rows = [{"iteration": k, **rate_pool(pool, edges)} for k, pool in pools.items()]
    write_csv(record / "pool.csv", POOL, ([row[name] for name in POOL] for row in rows))
    ids = sorted({id for pool in pools.values() for id in pool["id"]})
    place = {id: n for n, id in enumerate(ids)}
    maps = {name: np.full((len(pools), len(ids)), np.nan, np.float32) for name in ("score", "dice")}
    for row, pool in enumerate(pools.values()):
        for name, values in maps.items():
            values[row, [place[id] for id in pool["id"]]] = pool[name]
    with whole_file(record / "pool_images.npz") as partial, open(partial, "wb") as file:
        np.savez_compressed(file, ids=ids, iterations=list(pools), **maps)


def read_pool(folder):
    """scores.csv and queries.csv of an iteration: a dict of `id`, str (n,), `score` and `dice`, float64 (n,), and
    `group`, str (n,), empty for images that were not selected."""
    return join_pool(read_csv(folder / "scores.csv"), read_csv(folder / "queries.csv"))


def join_pool(scores, queries):
    """Like `read_pool`, from the rows of the two files."""
    groups = {row["id"]: row["group"] for row in queries}
    return {
        "id": np.array([row["id"] for row in scores]),
        "score": np.array([float(row["uncertainty"]) for row in scores]),
        "dice": np.array([float(row["dice"]) for row in scores]),
        "group": np.array([groups.get(row["id"], "") for row in scores]),
    }


def region_edges(scores):
    """The two scores that separate certain, uncertain and most uncertain images: the limits of the random group."""
    return tuple(sorted(ceal.random_range(*ceal.histogram(scores)[2:])))


def rate_pool(pool, edges):
    """The row of pool.csv for a pool: its size, the rank correlation of score and Dice, the number of images in each of
    the paper's four regions, and the mean Dice of the pool and of each group (empty for an empty group)."""
    low, high = edges
    score, dice = pool["score"], pool["dice"]
    certain, most = score < low, score >= high
    of_group = {name: dice[pool["group"] == name] for name in GROUPS if name != "audit"}
    constant = np.ptp(score) == 0 or np.ptp(dice) == 0
    return {
        "pool": len(score),
        "correlation": "" if constant else round(float(spearmanr(score, dice).statistic), 4),
        "certain_and_poor": int((certain & (dice < FAILURE)).sum()),
        "most_uncertain_region": int(most.sum()),
        "certain_and_right": int((certain & (dice >= FAILURE)).sum()),
        "uncertain_region": int((~certain & ~most).sum()),
        "dice_pool": round(float(dice.mean()), 4),
        **{f"dice_{name}": round(float(values.mean()), 4) if len(values) else "" for name, values in of_group.items()},
    }


def check_records(out, base):
    """Raise UserError if a record is damaged or has other settings, or if two records have different data."""
    data = {}
    for folder in record_folders(out):
        with as_written(folder):
            different = different_setting(folder / "config.json", configure(Run.named(folder.name), base))
            data[recorded_data(folder)] = folder
        if different:
            raise UserError(f"{folder} was made with {different}: give the same settings, or another --out")
    if len(data) > 1:
        raise UserError(f"{' and '.join(map(str, data.values()))} differ in their --data: give each its own --out")


def recorded_data(folder):
    """The fingerprint of the data that a record was made with."""
    return json.loads((folder / "environment.json").read_text())["data_fingerprint"]


def record_folders(out):
    """The folders of all records, except those that are still being written."""
    return sorted((out / "records").glob("[!.]*-*"))


@contextlib.contextmanager
def as_written(folder):
    """Turn an error that a damaged folder causes into a UserError that names the folder."""
    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{folder}: not as this program wrote it ({in_one_line(error)}); move it away")


def recorded_queries(folder):
    """The images that a record's run selected: a dict of iteration to a dict of id to group, in their order; empty if
    they were not kept, as in records of earlier versions other than that of `ceal` with seed 1."""
    found = {}
    for file in sorted(folder.glob("iteration_*_queries.csv")):
        found[int(file.name.split("_")[1])] = {row["id"]: row["group"] for row in read_csv(file)}
    for row in read_csv(folder / "queries.csv") if (folder / "queries.csv").exists() else ():
        found.setdefault(int(row["iteration"]), {})[row["id"]] = row["group"]
    return found


def read_pools(folder):
    """The pools of a record: a dict of iteration to pool, as from `read_pool`.

    Records of earlier versions have them as csv files, and only for `ceal` with seed 1."""
    pools = {}
    for file in sorted(folder.glob("iteration_*_scores.csv")):
        queries = file.with_name(file.name.replace("scores", "queries"))
        pools[int(file.name.split("_")[1])] = join_pool(read_csv(file), read_csv(queries))
    if not (folder / "pool_images.npz").exists():
        return pools
    groups = {(int(row["iteration"]), row["id"]): row["group"] for row in read_csv(folder / "queries.csv")}
    with np.load(folder / "pool_images.npz") as stored:
        ids = stored["ids"]
        for k, score, dice in zip(stored["iterations"].tolist(), stored["score"], stored["dice"]):
            there = np.isfinite(score)
            group = np.array([groups.get((k, id), "") for id in ids[there].tolist()])
            maps = {"score": score[there].astype(np.float64), "dice": dice[there].astype(np.float64)}
            pools[k] = {"id": ids[there], **maps, "group": group}
    return pools


def read_record(folder):
    """The results in a record, a dict. Raises ValueError and other errors of `as_written` if it is damaged."""
    history, test = read_csv(folder / "history.csv"), read_csv(folder / "test_dice.csv")
    names = [name for name in test[0] if name != "id"]
    pool = read_csv(folder / "pool.csv") if (folder / "pool.csv").exists() else []
    record = {
        "annotations": [int(row["annotations"]) for row in history],
        "dice": [float(row["dice"]) for row in history],
        "jaccard": [float(row["jaccard"]) for row in history],
        "images": np.array([[float(row[name]) for name in names] for row in test]),  # (image, iteration)
        "pool": [{name: json.loads(row[name] or "null") for name in POOL} for row in pool],
        "pools": read_pools(folder),
    }
    if record["images"].shape[1] != len(history):
        raise ValueError(f"{len(history)} rows in history.csv, {len(names)} iterations in test_dice.csv")
    return record


def read_records(out):
    """All records: a dict of (regime, arm) to a dict of seed to `read_record`, in the order of REGIMES and ARMS.

    Records of FULL are in each regime that has other arms. Raises UserError if a record is damaged."""
    found = {}
    for folder in record_folders(out):
        run = Run.named(folder.name)
        with as_written(folder):
            record = read_record(folder)
        for regime in REGIMES if run.arm in FULL else [run.regime]:
            found.setdefault((regime, run.arm), {})[run.seed] = record
    compared = {regime for regime, arm in found if arm not in FULL} or set(REGIMES)
    order = [(regime, arm) for regime in REGIMES if regime in compared for arm in ARMS]
    return {key: found[key] for key in order if key in found}


# ----------------------------------------------------------------------------------------------------------- statistics


def area(annotations, dice):
    """Mean height of the curve of Dice, (..., K), against annotations, (K,), or iterations if there are no queries."""
    annotations = annotations if annotations[-1] > annotations[0] else range(len(annotations))
    return np.trapezoid(dice, annotations) / (annotations[-1] - annotations[0])


def interval(differences):
    """95 % bootstrap interval of the mean of differences (seed, image). Seeds and images are resampled independently.

    The variances over seeds and over images count once, as they should. The interaction of seed and image counts up to
    three times, so the interval is rather wide (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007)."""
    seeds, images = map(np.arange, differences.shape)

    def mean(some_seeds, some_images, axis):
        return differences[some_seeds[..., :, None], some_images[..., None, :]].mean((-2, -1))

    options = {"n_resamples": 4000, "method": "percentile"}
    found = bootstrap((seeds, images), mean, rng=np.random.default_rng(0), **options)
    return tuple(map(float, found.confidence_interval))


def interval_over_seeds(differences):
    """95 % interval (Student's t) over seeds of the mean of differences (seed, image), for these images only."""
    return tuple(map(float, ttest_1samp(differences.mean(1), 0).confidence_interval()))


def against_random(runs, baseline, measure, interval_of=interval):
    """Mean difference of `measure`, record -> (image,), between an arm and `random` over common seeds, with its 95 %
    interval: (mean, low, high). None if there are fewer than two common seeds."""
    seeds = sorted(runs.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    differences = np.stack([measure(runs[seed]) - measure(baseline[seed]) for seed in seeds])
    return float(differences.mean()), *interval_of(differences)


def last_dice(record):
    """Each test image's Dice after the last iteration, (image,)."""
    return record["images"][:, -1]


def mean_dice(record):
    """Each test image's mean Dice along the curve, (image,): its `area`."""
    return area(record["annotations"], record["images"])


def summarise(found):
    """The rows of the table, a dict for each regime and arm. found: as from `read_records`."""
    rows = []
    for (regime, arm), runs in found.items():
        ends = np.array([run["dice"][-1] for run in runs.values()])
        row = {
            "regime": regime,
            "arm": arm,
            "seeds": len(runs),
            "annotations": max(r["annotations"][-1] for r in runs.values()),
        }
        row |= {"dice": ends.mean(), "dice_sd": ends.std(ddof=1) if len(ends) > 1 else None}
        row["jaccard"] = np.mean([run["jaccard"][-1] for run in runs.values()])
        full, baseline = found.get((regime, "full"), {}), found.get((regime, "random"), {})
        common = sorted(full.keys() & runs.keys())
        reference = np.mean([full[seed]["dice"][-1] for seed in common]) if common else None
        row["of_full"] = np.mean([runs[seed]["dice"][-1] for seed in common]) / reference if common else None
        if arm not in FULL:
            areas = np.array([area(run["annotations"], run["dice"]) for run in runs.values()])
            row |= {"area": areas.mean(), "area_sd": areas.std(ddof=1) if len(areas) > 1 else None}
            shared = {seed: runs[seed] for seed in common}
            row |= {f"annotations_to_{share}": needed(shared, share / 100, reference) for share in (95, 99)}
        if arm not in ("random", *FULL):
            row["dice_against_random"] = against_random(runs, baseline, last_dice)
            row["area_against_random"] = against_random(runs, baseline, mean_dice)
            row["area_on_these_images"] = against_random(runs, baseline, mean_dice, interval_over_seeds)
        rows.append(row)
    return rows


def mean_curve(runs):
    """(annotations, mean Dice over the seeds), float (K,) each."""
    return np.mean([run["annotations"] for run in runs.values()], 0), np.mean([run["dice"] for run in runs.values()], 0)


def needed(runs, share, reference):
    """The annotations at which the mean curve over seeds first reaches this share of `reference`, or None."""
    if reference is None:
        return None
    annotations, dice = mean_curve(runs)
    reached = annotations[dice >= share * reference]
    return int(reached[0]) if len(reached) else None


def reached(annotations, dice, level):
    """The annotations, interpolated, at which a curve, (K,) and (K,), first reaches this Dice; NaN if it never does."""
    k = int(np.argmax(dice >= level))
    if dice[k] < level:
        return np.nan
    return float(np.interp(level, dice[k - 1 : k + 1], annotations[k - 1 : k + 1])) if k else float(annotations[0])


def as_text(value):
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, low, high = value
        return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def write_table(path, header, rows):
    """Write rows, each a dict, as a table in Markdown with the columns `header`."""
    cells = [[as_text(row.get(name)) for name in header] for row in rows]
    with whole_file(path) as partial:
        lines = (f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *cells])
        partial.write_text("".join(lines).replace("_", " "))


# ------------------------------------------------------------------------------------------ the numbers of the figures


def curves(found):
    """Dice against annotations of every arm with the standard deviation over seeds, for figures.figure_curves.

    An arm without queries is drawn at the annotations that the other arms have after the same number of steps."""
    panels = {}
    for regime in REGIMES:
        arms = [arm for arm in STYLES if (regime, arm) in found]
        if not set(arms) - set(FULL):
            continue
        asked = max((mean_curve(found[regime, arm])[0] for arm in arms if arm not in FULL), key=lambda a: a[-1])
        panels[f"{regime} regime"] = lines = []
        for arm in arms:
            runs = found[regime, arm]
            annotations, dice = mean_curve(runs)
            spread = np.std([run["dice"] for run in runs.values()], 0, ddof=min(1, len(runs) - 1))
            labels = f", {annotations[0]:.0f} labels" if annotations[0] == annotations[-1] else ""
            at = asked if labels and len(asked) == len(dice) else annotations
            lines.append(Curve(f"{arm}{labels} ({len(runs)})", STYLES[arm], at, dice, spread))
    return panels


def differences(found):
    """Each arm's Dice minus that of `random` after each iteration, over common seeds, with the 95 % interval of
    `interval`, for figures.figure_differences."""
    panels = {}
    for (regime, arm), runs in found.items():
        baseline = found.get((regime, "random"), {})
        seeds = len(runs.keys() & baseline.keys())
        if arm not in ("random", *FULL) and seeds > 1:
            annotations, _ = mean_curve(baseline)
            at = [lambda run, k=k: run["images"][:, k] for k in range(len(annotations))]
            values = np.transpose([against_random(runs, baseline, measure) for measure in at])
            panels.setdefault(regime, []).append((f"{arm} ({seeds} seeds)", annotations, *values))
    return panels


def saved(found):
    """How many fewer annotations than `random` each arm needs to reach the best Dice of `random` so far, over common
    seeds, for figures.figure_saved."""
    panels = {}
    for (regime, arm), runs in found.items():
        baseline = found.get((regime, "random"), {})
        seeds = runs.keys() & baseline.keys()
        if arm in ("random", "no_queries", *FULL) or not seeds:
            continue
        annotations, dice = mean_curve({seed: runs[seed] for seed in seeds})
        reference = mean_curve({seed: baseline[seed] for seed in seeds})[1]
        # The best so far, because a curve may fall again after it has reached a level.
        levels = np.maximum.accumulate(reference)
        fewer = [reached(annotations, reference, level) - reached(annotations, dice, level) for level in levels]
        curve = Curve(f"{arm} ({len(seeds)})", STYLES[arm], annotations, np.array(fewer))
        panels.setdefault(f"{regime} regime", []).append(curve)
    return panels


def pool_means(found):
    """The means over seeds of the columns of pool.csv for `ceal` in the first regime that has it, for
    figures.figure_pool: (iterations, dict of column to float (K,), NaN for an empty group); None without a pool.csv."""
    runs = next((found[key] for key in ((regime, "ceal") for regime in REGIMES) if key in found), None)
    if runs is None or not any(run["pool"] for run in runs.values()):
        return None
    tables = [run["pool"] for run in runs.values()]

    def mean(name):
        columns = np.array([[row[name] for row in table] for table in tables], float)  # None (empty group): NaN
        return np.ma.masked_invalid(columns).mean(0).filled(np.nan)  # without a warning for an empty group

    return [row["iteration"] for row in tables[0]], {name: mean(name) for name in POOL}


def regions(pools):
    """A list of figures.Regions, all with the limits of the first pool. pools: a dict of iteration to pool."""
    edges = region_edges(pools[min(pools)]["score"])
    titles = {k: f"after iteration {k - 1}: {len(pool['score'])} in the pool" for k, pool in pools.items()}
    return [Regions(titles[k], p["score"], p["dice"], p["group"], edges, FAILURE) for k, p in pools.items()]
