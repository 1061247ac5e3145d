"""What stopping by the stability of the masks would have cost and saved, on the records of finished runs.

    PYTHONPATH=. python results/stopping.py results/annotating/records/*

For each level: the runs in which IN_A_ROW iterations in a row reach it before the last iteration, the annotations there
and the Dice of the test images at the end less there, with a 95 % interval over these runs (Student's).
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from quality import is_stable
from utils import read_csv


def stop(stabilities, level):
    """The first iteration after which the rule holds, or None."""
    return next((k for k in range(len(stabilities)) if is_stable(stabilities[: k + 1], level)), None)


runs = []
for record in map(Path, sys.argv[1:]):
    history, quality = read_csv(record / "history.csv"), read_csv(record / "quality.csv")
    stabilities = [float(row["stability"] or "nan") for row in quality]
    runs.append((stabilities, [int(row["annotations"]) for row in history], [float(row["dice"]) for row in history]))
print(f"{len(runs)} runs; stability of the last iteration: mean {np.mean([run[0][-1] for run in runs]):.3f}")
print("| level | runs stopped | annotations | saved | Dice at the end less there |")
print("| ---: | ---: | ---: | ---: | --- |")
for level in (0.93, 0.94, 0.95, 0.96, 0.97):
    found = []
    for stabilities, annotations, dice in runs:
        if k := stop(stabilities[:-1], level):
            found.append((annotations[k], annotations[-1] - annotations[k], dice[-1] - dice[k]))
    cells = "| | | "
    if found:
        at, saved, cost = np.array(found).T
        half = student.ppf(0.975, len(cost) - 1) * cost.std(ddof=1) / np.sqrt(len(cost)) if len(cost) > 1 else np.nan
        cells = f"| {at.mean():.0f} ({at.min():.0f} to {at.max():.0f}) | {saved.mean():.0f} "
        cells += f"| {cost.mean():+.4f} ({cost.mean() - half:+.4f} to {cost.mean() + half:+.4f}) "
    print(f"| {level} | {len(found)} of {len(runs)} {cells}|")
