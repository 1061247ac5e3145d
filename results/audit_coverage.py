"""How often the interval of --audit covers the true mean Dice of the pool, on the recorded pools of finished runs.

    PYTHONPATH=. python results/audit_coverage.py 10 results/annotating/records/*

First the estimates of the runs themselves, if they had --audit. Then the audited images of each pool are drawn anew, 30
times; the other answers are those of the record. Beside it: the mean of as many images as were audited or in the group
`random`, drawn uniformly, with Student's interval.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from audit import ESTIMATE, Scored, estimate_pool_dice
from experiment import read_pools
from utils import read_csv


def asked(pool, rng, audited):
    """The Scored of a recorded pool with newly drawn audited images."""
    audit = rng.choice(len(pool["score"]), audited, replace=False)
    groups = {name: np.flatnonzero(pool["group"] == name) for name in ("no_detection", "most_uncertain", "random")}
    groups = {name: np.setdiff1d(at, audit) for name, at in groups.items()} | {"audit": audit}
    return Scored(pool["score"], {name: (at, pool["dice"][at]) for name, at in groups.items()})


def uniform(pool, rng, count):
    """Whether Student's interval of `count` images, drawn uniformly, covers the pool's mean Dice, and its width."""
    sample = pool["dice"][rng.choice(len(pool["dice"]), count, replace=False)]
    half = student.ppf(0.975, count - 1) * sample.std(ddof=1) / np.sqrt(count)
    return abs(sample.mean() - pool["dice"].mean()) <= half, 2 * half


def as_run(record, recorded, rng):
    """A row for each estimate in quality.csv."""
    for row in read_csv(record / "quality.csv") if (record / "quality.csv").exists() else ():
        if row["estimate"]:
            pool = recorded[int(row["iteration"])]
            estimate, low, high = (float(row[name]) for name in ESTIMATE)
            truth, count = pool["dice"].mean(), np.isin(pool["group"], ("audit", "random")).sum()
            covered = low <= truth <= high, high - low
            yield int(row["iteration"]), estimate - truth, *covered, *uniform(pool, rng, count)


def drawn_anew(recorded, rng, audited):
    """A row for each estimate with newly drawn audited images."""
    pools = []
    for iteration in sorted(recorded):
        pool, truth = recorded[iteration], recorded[iteration]["dice"].mean()
        pools.append(asked(pool, rng, audited))
        estimate, low, high = estimate_pool_dice(pools)
        count = sum(len(pools[-1].answered[name][0]) for name in ("audit", "random"))
        covered = low <= truth <= high, high - low
        yield iteration, estimate - truth, *covered, *uniform(pool, rng, count)


def print_table(title, rows):
    """Print the table of these rows."""
    print(f"{title}, {len(rows)} estimates")
    print("| iterations | bias | covered | width | as many, uniformly: covered | width |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = np.array(rows)
    for first, last in ((1, 1), (2, 9), (1, 9)):
        some = rows[(rows[:, 0] >= first) & (rows[:, 0] <= last)]
        bias, covered, width, other, other_width = some[:, 1:].mean(0)
        print(f"| {first} to {last} | {bias:+.4f} | {covered:.1%} | {width:.3f} | {other:.1%} | {other_width:.3f} |")


audited, records, rng = int(sys.argv[1]), list(map(Path, sys.argv[2:])), np.random.default_rng(0)
recorded = {record: read_pools(record) for record in records}
if rows := [row for record in records for row in as_run(record, recorded[record], rng)]:
    print_table(f"{len(records)} runs, as they were", rows)
rows = [row for record in records for _ in range(30) for row in drawn_anew(recorded[record], rng, audited)]
print_table(f"{len(records)} runs, with --audit {audited} drawn anew", rows)
