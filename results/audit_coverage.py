"""How often the interval of --audit covers the true mean Dice of the pool, on the recorded pools of finished runs.

    PYTHONPATH=. python results/audit_coverage.py 10 results/quick/records/scarce-ceal-1 ...

In each pool the audited images are drawn anew, 30 times; the other answers are those of the record. Beside it: the mean
of as many images as were audited or in the group `random`, drawn uniformly, with Student's interval.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from audit import Scored, estimate_pool_dice
from experiment import read_pools


def asked(pool, rng, audited):
    """The Scored of a recorded pool with newly drawn audited images."""
    audit = rng.choice(len(pool["score"]), audited, replace=False)
    groups = {name: np.flatnonzero(pool["group"] == name) for name in ("no_detection", "most_uncertain", "random")}
    groups = {name: np.setdiff1d(at, audit) for name, at in groups.items()} | {"audit": audit}
    return Scored(pool["score"], {name: (at, pool["dice"][at]) for name, at in groups.items()})


audited, rng, rows = int(sys.argv[1]), np.random.default_rng(0), []
for record in map(Path, sys.argv[2:]):
    recorded = read_pools(record)
    for _ in range(30):
        pools = []
        for iteration in sorted(recorded):
            pool, truth = recorded[iteration], recorded[iteration]["dice"].mean()
            pools.append(asked(pool, rng, audited))
            estimate, low, high = estimate_pool_dice(pools)
            count = sum(len(pools[-1].answered[name][0]) for name in ("audit", "random"))
            sample = pool["dice"][rng.choice(len(pool["dice"]), count, replace=False)]
            half = student.ppf(0.975, count - 1) * sample.std(ddof=1) / np.sqrt(count)
            uniform = abs(sample.mean() - truth) <= half, 2 * half
            rows.append((iteration, estimate - truth, low <= truth <= high, high - low, *uniform))
rows = np.array(rows)
print(f"--audit {audited}, {len(sys.argv) - 2} runs, {len(rows)} estimates")
print("| iterations | bias | covered | width | as many, uniformly: covered | width |")
print("| --- | ---: | ---: | ---: | ---: | ---: |")
for first, last in ((1, 1), (2, 9), (1, 9)):
    some = rows[(rows[:, 0] >= first) & (rows[:, 0] <= last)]
    bias, covered, width, other, other_width = some[:, 1:].mean(0)
    print(f"| {first} to {last} | {bias:+.4f} | {covered:.1%} | {width:.3f} | {other:.1%} | {other_width:.3f} |")
