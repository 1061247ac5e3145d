"""Estimates while annotating: how good the network's masks were before the answers came, and whether they still change.

Both need no test images. Nothing here knows the network or the loop: it gets functions of positions to masks.
"""

import numpy as np

from audit import ESTIMATE, estimates
from utils import UserError, derived_seed, read_csv, segmentation_metrics, write_csv

LATE = "late"  # the group of an answer to an image that an earlier iteration had asked for
COMPARED = "no_detection", "most_uncertain", "random"  # groups with means of their own
MEANS = [f"{metric}_{group}" for group in COMPARED for metric in ("dice", "jaccard")]
OF_ITERATION = ["iteration", "answers", "dice", "jaccard", *MEANS, "stability"]  # of iteration_KK/quality.csv
QUALITY = [*OF_ITERATION, "stable", *ESTIMATE]  # of RUN/quality.csv
ANSWERS = ["id", "group", "dice", "jaccard"]  # of iteration_KK/answers.csv
MAPS = "proposals", "uncertainty", "answers"  # of iteration_KK/answers.npz, (n, H, W) each

# The pool's images whose masks are compared from one iteration to the next: at most a third of the pool, so that this
# takes less than 5 % of an iteration.
WATCHED = 256
# The masks are stable after so many iterations in a row with at least this stability. Chosen on labelled images that
# were held out of one run on ISIC 2017: docs/annotating.md, "When to stop".
STABLE, IN_A_ROW = 0.96, 3


class Quality:
    """What the estimates of a run need from one iteration to the next."""

    def __init__(self, ids, pool, seed, propose, predict):
        """ids: of all images; pool: positions of the run's pool at the start; propose: (positions, iteration) -> an
        iterable of (probabilities, uncertainty map), float32 (H, W) each, of the Monte Carlo passes; predict: positions
        -> probabilities with dropout off, float32 (n, H, W)."""
        self.ids, self.propose, self.predict = ids, propose, predict
        rng = np.random.default_rng(derived_seed(seed, "stopping"))
        count = min(WATCHED, -(-len(pool) // 3))
        self.watched = np.sort(rng.choice(pool, count, replace=False)) if count else np.array([], int)
        self.masks = None  # of the images watched, from the network as it was after the last training

    def before_training(self, pool, unanswered, iteration, selection, folder):
        """Compare the new masks of the ceal.Pool with those of the network that was not yet trained on them.

        unanswered: the positions that were in the pool before the answers came; selection: a folder with the
        iteration's queries.csv. Writes answers.csv and answers.npz to `folder`. Returns the means, a dict of columns of
        QUALITY."""
        if not iteration:
            return {}
        if self.masks is None and len(self.watched):  # the first training of this start
            self.masks = self.predict(self.watched) > 0.5
        positions, labels = pool.training_set()
        new = np.isin(positions, unanswered)
        drawn = {id: labels[n] for id, n in zip(self.ids[positions[new]], np.flatnonzero(new))}
        groups = {row["id"]: row["group"] for row in read_csv(selection / "queries.csv") if row["group"] != "pseudo"}
        groups.update((id, LATE) for id in drawn if id not in groups)
        if not groups:
            return {"answers": "0"}
        place = {id: n for n, id in enumerate(self.ids)}
        asked = np.array([place[id] for id in groups])
        proposals, uncertainty = map(np.stack, zip(*self.propose(asked, iteration)))
        still = set(pool.unlabelled)
        states = ["drawn" if id in drawn else "missing" if place[id] in still else "rejected" for id in groups]
        return write_answers(groups, states, proposals > 0.5, uncertainty, drawn, folder)

    def after_training(self, iteration, means, folder):
        """Measure how far the masks of the images watched have changed, and write the row of quality.csv, which
        `before_training` began with `means`, to the iteration's folder."""
        row = {**dict.fromkeys(OF_ITERATION, ""), **means, "iteration": str(iteration)}
        if iteration and len(self.watched):
            before, self.masks = self.masks, self.predict(self.watched) > 0.5
            row["stability"] = f"{segmentation_metrics(before, self.masks)['dice'].mean():.6f}"
        write_csv(folder / "quality.csv", OF_ITERATION, [row.values()])


def write_answers(groups, states, proposals, uncertainty, drawn, folder):
    """Write answers.csv, and answers.npz with the maps behind it. Returns the means, a dict of columns of QUALITY.

    groups: a dict of id to group, of the n images asked for; states: n of drawn, rejected, missing; proposals: bool
    (n, H, W); uncertainty: float32 (n, H, W); drawn: a dict of id to mask, uint8 0/1 (H, W)."""
    masks = np.stack([drawn.get(id, np.zeros(proposals.shape[1:])) > 0 for id in groups])
    rated = segmentation_metrics(masks, proposals)
    rows = list(zip(groups, groups.values(), *(rated[metric].round(6) for metric in ("dice", "jaccard"))))
    rows = [row for row, state in zip(rows, states) if state == "drawn"]
    write_csv(folder / "answers.csv", ANSWERS, rows)
    levels = (255 * uncertainty / max(uncertainty.max(), 1e-12)).round().astype(np.uint8)
    maps = dict(zip(MAPS, (proposals, levels, masks)))
    # As bytes, because ids may hold bytes that are not UTF-8.
    ids = np.array([id.encode("utf-8", "surrogateescape") for id in groups])
    np.savez_compressed(folder / "answers.npz", ids=ids, groups=list(groups.values()), states=states, **maps)
    means = {"answers": str(len(rows)), **mean_of(rows)}
    for group in COMPARED:
        means |= {f"{name}_{group}": value for name, value in mean_of([r for r in rows if r[1] == group]).items()}
    return means


def mean_of(rows):
    """The means of Dice and Jaccard of rows of answers.csv; empty without rows."""
    return {
        name: f"{np.mean([row[n] for row in rows]):.6f}" if rows else "" for n, name in ((2, "dice"), (3, "jaccard"))
    }


def read_answers_of(folder):
    """The content of answers.npz of an iteration's folder: a dict of `ids`, `groups`, `states` (lists of str), and
    `proposals`, `answers`, bool, and `uncertainty`, uint8, all (n, H, W); the largest uncertainty is 255. None if an
    earlier version wrote the folder, or the file is damaged."""
    try:
        with np.load(folder / "answers.npz") as file:
            found = {name: file[name] for name in file.files}
        found["ids"] = [id.decode("utf-8", "surrogateescape") for id in found["ids"].tolist()]
        return {**found, "groups": found["groups"].tolist(), "states": found["states"].tolist()}
    except Exception:  # zipfile and NumPy raise many kinds; the page of a run can do without the maps
        return None


# ------------------------------------------------------------------------------------------------------- all iterations


def is_stable(stabilities, level=STABLE):
    """Whether the last IN_A_ROW of these numbers, one per iteration or None, reach the level."""
    last = stabilities[-IN_A_ROW:]
    return len(last) == IN_A_ROW and all(value is not None and value >= level for value in last)


def read_quality(run, iterations):
    """The rows of RUN/quality.csv, a list of dict of str, from the folders of this number of finished iterations. The
    cells of an iteration that an earlier version did are empty."""
    rows, stabilities = [], []
    for iteration in range(iterations):
        path, row = run / f"iteration_{iteration:02d}" / "quality.csv", dict.fromkeys(QUALITY, "")
        try:
            (found,) = read_csv(path) if path.exists() else ({},)
            row |= {**{name: found[name] for name in found if name in QUALITY}, "iteration": str(iteration)}
            stabilities.append(float(row["stability"]) if row["stability"] else None)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not as train.py wrote it ({error}); remove it, and its cells stay empty")
        row["stable"] = "" if stabilities[-1] is None else str(int(is_stable(stabilities)))
        rows.append(row)
    return [row | estimate for row, estimate in zip(rows, estimates(run, iterations))]


def write_quality(run, iterations):
    """Write RUN/quality.csv. Returns its rows."""
    rows = read_quality(run, iterations)
    write_csv(run / "quality.csv", QUALITY, [row.values() for row in rows])
    return rows


def sentence(row):
    """How far the masks of the pool changed in the iteration of this row of quality.csv, and how good they were before
    its training, as far as this was measured."""
    parts = []
    if row["stability"]:
        dice = float(row["stability"])
        parts.append(f"the masks of the pool changed by {100 * (1 - dice):.1f} % (Dice {dice:.3f})")
    if row["estimate"]:
        parts.append("estimated Dice {:.2f} ({:.2f} to {:.2f})".format(*(float(row[name]) for name in ESTIMATE)))
    return ", ".join(parts) + (": more annotations will change little" if row["stable"] == "1" else "")
