"""What a person sees of a run: the figures of an iteration, overview.png, and report.html, one page without a server.

The page is made from the run's folder and the data set alone, so every start can write it anew. `python report.py RUN
DATA` writes it to stdout; train.py calls this on a GPU, where drawing would hold up the training.
"""

import base64
import functools
import io
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

import ceal
from data import Dataset
from figures import GROUPS, Drawing, figure_examples, figure_overview, figure_scores
from pictures import open_picture
from quality import COMPARED, LATE, MAPS, STABLE, read_answers_of, read_quality, sentence
from run_folder import INITIAL, read_last_selection, read_selection
from utils import LIKELY_DISPUTED, UserError, open_hdf5, printable, read_csv, segmentation_metrics, whole_file

NAMES = {group: label for group, (label, *_) in GROUPS.items()} | {LATE: "answered late", INITIAL: "initial"}
LARGE, SMALL = 208, 144  # pixels of the longer side of a picture: of the last iteration, of the others
LIKELY = "specialists are likely to disagree"
IN_FULL = 100  # an iteration with more images than this is shown in the small form
MOST = 4_000_000  # characters of all pictures; the page stays below 5 MB
WIDTH, HEIGHT, LEFT, BELOW = 480, 270, 52, 40  # of a chart and its margins
MARKS = {**{group: style[2] for group, style in GROUPS.items()}, "other": "o"}

# ------------------------------------------------------------------------------------------------------------ the page


class Page:
    """RUN/report.html. If `beside`, a process of its own makes it, so that a GPU does not wait for it."""

    def __init__(self, run, dataset, beside=False):
        self.run, self.dataset, self.beside, self.process = run, dataset, beside, None

    def update(self, done=False):
        """Write the page, or begin to; `done`: no more training follows."""
        self.finish()
        if not self.beside:
            self._write(make_page(self.run, self.dataset, done).encode())
            return
        # As in figures.Drawing.
        command = [sys.executable, __file__, self.run, self.dataset.path, *["done"] * done]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(list(map(str, command)), **options), done

    def finish(self):
        """Write the page that was begun."""
        if self.process is None:
            return
        (process, done), self.process = self.process, None
        page, _ = process.communicate()
        self._write(make_page(self.run, self.dataset, done).encode() if process.returncode else page)

    def update_now(self):
        """Write the page at once, because a person is waited for."""
        self.update()
        self.finish()

    def _write(self, page):
        with whole_file(self.run / "report.html") as partial:
            partial.write_bytes(page)


@functools.cache  # compiling takes longer than filling in
def template():
    """The page's Jinja template."""
    import jinja2  # here, so that --help appears at once

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)
    environment.filters["three"] = lambda cell: f"{float(cell):.3f}" if cell else ""
    return environment.get_template("report.html")


def make_page(run, dataset, done=False):
    """The page of a run, a str of HTML."""
    config = json.loads((run / "config.json").read_text())
    about = json.loads((run / "environment.json").read_text())
    history = read_csv(run / "history.csv") if (run / "history.csv").exists() else []
    quality, answers, left = read_quality(run, len(history)), read_annotations(run), Room(MOST)
    waiting = None if done or config["oracle"] == "simulated" else pending(run, len(history), dataset, answers, left)
    last = run / f"iteration_{len(history) - 1:02d}"
    page = template().render(
        name=printable(run),
        config=config,
        about=about,
        dataset=dataset,
        history=history,
        quality=quality,
        groups=[(group, NAMES[group]) for group in COMPARED],
        audited=any(row["estimate"] for row in quality),
        state=state(config, history, waiting, done),
        next=what_next(run, history, waiting, done, config),
        waiting=waiting,
        changes=changes(history, quality, answers),
        stable=STABLE,
        likely=(LIKELY, LIKELY_DISPUTED),
        charts=[
            chart
            for chart in (dice_chart(history), quality_chart(history, quality), stability_chart(history, quality))
            if chart
        ],
        histogram=score_chart(*read_selection(last)[1:]) if (last / "scores.csv").exists() else None,
        # The newest first, because older pictures are left out where the page would become too large.
        galleries=[gallery(run, k, len(history) - 1, dataset, answers, left) for k in range(len(history) - 1, 0, -1)],
    )
    return page.encode(errors="backslashreplace").decode()  # a folder's name may hold bytes that are not UTF-8


def state(config, history, waiting, done):
    """How far the run is, in a sentence."""
    begun = "The first training has not ended yet."
    if history:
        finished, annotations = len(history) - 1, history[-1]["annotations"]
        begun = f"Iteration {finished} of {config['iterations']} is finished, with {annotations} annotations."
    if waiting:
        return f"{begun} The run waits for answers: {waiting['answered']} of {len(waiting['images'])} are there."
    if done:
        return f"{begun} The run has ended."
    return f"{begun} The run goes on by itself."


def what_next(run, history, waiting, done, config):
    """What to do next: a sentence and a command."""
    command = f"python train.py --run {shlex.quote(str(run))}"
    if done:
        weights = shlex.quote(str(run / f"iteration_{len(history) - 1:02d}" / "model.weights.h5"))
        return "Masks for your own images:", f"python predict.py IMAGES --weights {weights} --out masks"
    if waiting and config["oracle"] == "labelstudio":
        return f"Answer the tasks in Label Studio at {config['labelstudio']}, then run:", command
    if waiting:
        return f"Draw the missing masks in {waiting['folder']}, as README.txt there explains, then run:", command
    return "Nothing. If the run was interrupted, this continues it:", command


def changes(history, quality, answers):
    """What the last iteration changed, a list of sentences."""
    if len(history) < 2:
        return []
    before, now, row = history[-2], history[-1], quality[-1]
    more = int(now["annotations"]) - int(before["annotations"])
    found = [f"Annotations: {now['annotations']} ({more:+d}); pseudo-labels: {now['pseudo_labels']}."]
    of_now = [answer for answer in answers if answer["iteration"] == len(history) - 1]
    rejected = sum(bool(answer["rejection"]) for answer in of_now)
    earlier = {answer["id"] for answer in answers if answer["iteration"] < len(history) - 1}
    corrected = sum(answer["id"] in earlier for answer in of_now)
    if rejected or corrected:
        found.append(f"Rejected images: {rejected}; corrections of earlier answers: {corrected}.")
    if now["dice"]:
        was, is_now = float(before["dice"]), float(now["dice"])
        found.append(f"Dice on the test images: {was:.3f} before, {is_now:.3f} now ({is_now - was:+.3f}).")
    if row["dice"]:
        of_groups = [f"{NAMES[g]} {float(row[f'dice_{g}']):.3f}" for g in COMPARED if row[f"dice_{g}"]]
        found.append(
            f"Dice of the network's proposals, made before this training, with the {row['answers']} answers: "
            f"{float(row['dice']):.3f} ({', '.join(of_groups) or 'no group of its own'})."
        )
    if changed := sentence(row):
        found.append(changed[0].upper() + changed[1:] + ".")
    return found


# ------------------------------------------------------------------------------------------------------- the pictures


class Room:
    """The number of characters that are left for pictures."""

    def __init__(self, left):
        self.left = left

    def picture(self, pixels, size, *outlines):
        """A JPEG of `pixels`, uint8 (H, W, C) or (H, W), whose longer side is `size`, as a data URI, or None if no room
        is left. outlines: (mask bool (H, W), colour, dashed)."""
        if self.left <= 0:
            return None
        pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
        picture = Image.fromarray(pixels).convert("RGB" if outlines or pixels.ndim == 3 else "L")
        scale = size / max(picture.size)
        size = tuple(max(1, round(scale * side)) for side in picture.size)
        values = np.array(picture.resize(size, Image.Resampling.BICUBIC))
        for mask, colour, dashed in outlines:
            draw_outline(values, np.array(Image.fromarray(mask).resize(size)), colour, dashed)
        Image.fromarray(values).save(file := io.BytesIO(), "JPEG", quality=72)
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        self.left -= len(uri)
        return uri


def draw_outline(values, mask, colour, dashed):
    """Draw the outline of a mask into `values`, uint8 (H, W, 3), with a black edge, so that it shows in grey too."""
    line = mask & ~binary_erosion(mask, border_value=1)
    if dashed:
        y, x = np.indices(mask.shape)
        line &= (x + y) % 10 < 6
    values[binary_dilation(line, np.ones((3, 3)))] = 0
    values[line] = colour


def read_annotations(run):
    """The rows of annotations.h5, a list of dict of id, iteration and rejection; empty without the file."""
    if not (run / "annotations.h5").exists():
        return []
    with open_hdf5(run / "annotations.h5") as file:
        columns = file["ids"].asstr()[:], file["iterations"][:].tolist(), file["rejections"].asstr()[:]
    return [dict(zip(("id", "iteration", "rejection"), row)) for row in zip(*columns)]


def pending(run, iteration, dataset, answers, room):
    """The images that a person is asked for and that no iteration has used yet, a dict for the template, or None."""
    selection, folder = run / f".queries_{iteration:02d}", run / "annotate" / f"iteration_{iteration:02d}"
    try:
        rows = [(row["id"], row["group"]) for row in read_csv(selection / "queries.csv") if row["group"] != "pseudo"]
        scores = read_scores(selection)
    except (OSError, KeyError, ValueError):  # missing, or train.py will say what is wrong with it
        return None
    place, given, images = {id: n for n, id in enumerate(dataset.ids)}, {answer["id"] for answer in answers}, []
    for id, group in rows:
        overlay = read_overlay(folder / "overlay" / f"{id}.png")
        image = {**captions(id, group, scores, ""), "answered": id in given, "proposed": overlay is not None}
        pixels = dataset.images([place[id]])[0] if overlay is None else overlay
        images.append({**image, "uri": room.picture(pixels, LARGE)})
    answered = sum(image["answered"] for image in images)
    return (
        {"iteration": iteration, "folder": printable(folder), "images": images, "answered": answered} if rows else None
    )


def read_overlay(path):
    """A small copy of a picture with the outline of the proposal, uint8 (H, W, 3), or None if it cannot be read."""
    try:
        with open_picture(path) as picture:
            picture.thumbnail((LARGE, LARGE))
            return np.array(picture.convert("RGB"))
    except UserError:
        return None


def read_scores(folder):
    """A dict of id to the words about the score of a selection's images; empty if the pool was not scored."""
    path, found = folder / "scores.csv", {}
    for row in read_csv(path) if path.exists() else ():
        disputed = float(row.get("agreement") or 1) < LIKELY_DISPUTED  # scores of an earlier version do not tell
        found[row["id"]] = f"{float(row['uncertainty']):.3g}{f', {LIKELY}' if disputed else ''}"
    return found


def captions(id, group, scores, dice):
    """The words below the pictures of an image."""
    return {
        "id": printable(id),
        "group": NAMES.get(group, group),
        "score": scores.get(id, ""),
        "dice": f"{float(dice):.3f}" if dice else "",
    }


def gallery(run, iteration, last, dataset, answers, room):
    """The images that an iteration asked for, a dict for the template: in full for the last iteration, with one picture
    an image for the others."""
    folder = run / f"iteration_{iteration:02d}"
    groups = {row["id"]: row["group"] for row in read_csv(folder / "queries.csv") if row["group"] != "pseudo"}
    maps, scores, rated = read_answers_of(folder), read_scores(folder), {}
    if maps and (folder / "answers.csv").exists():
        rated = {row["id"]: row["dice"] for row in read_csv(folder / "answers.csv")}
    groups |= dict(zip(maps["ids"], maps["groups"])) if maps else {}
    full = iteration == last and len(groups) <= IN_FULL
    reasons = {answer["id"]: answer["rejection"] for answer in answers if answer["iteration"] == iteration}
    place, images = {id: n for n, id in enumerate(dataset.ids)}, []
    known = {id: n for n, id in enumerate(maps["ids"])} if maps else {}
    for id, group in groups.items():
        if room.left <= 0:
            break
        image = {**captions(id, group, scores, rated.get(id, "")), "reason": printable(reasons.get(id, ""))}
        image["state"] = maps["states"][known[id]] if id in known else "drawn"
        mine = {name: maps[name][known[id]] for name in MAPS} if id in known else None
        image["pictures"] = pictures(dataset.images([place[id]])[0], mine, image["state"] == "drawn", full, room)
        images.append(image)
    left_out = len(groups) - len(images)
    return {"iteration": iteration, "full": full, "maps": bool(maps), "images": images, "left_out": left_out}


def pictures(pixels, maps, drawn, full, room):
    """The pictures of an image, a list of (caption, data URI). maps: of this image, as in quality.read_answers_of, or
    None; drawn: whether its answer is a mask; full: a picture for each map, not one for all."""
    outlines = {}
    if maps:
        outlines["proposal"] = maps["proposals"], (255, 255, 0), True
    if maps and drawn:
        outlines["answer"] = maps["answers"], (0, 255, 255), False
    if not full:
        return [("outlines", room.picture(pixels, SMALL, *reversed(outlines.values())))]
    found = [("image", room.picture(pixels, LARGE))]
    found += [(name, room.picture(pixels, LARGE, outline)) for name, outline in outlines.items()]
    if maps:
        found.append(("uncertainty", room.picture(maps["uncertainty"], LARGE)))
    return [(name, uri) for name, uri in found if uri]


# --------------------------------------------------------------------------------------------------------- the charts


def ticks(low, high, most=6):
    """At most about `most` round numbers from low to high."""
    step = next(
        step
        for power in itertools.count(int(np.floor(np.log10(max(high - low, 1e-9) / most))))
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if (high - low) / step <= most
    )
    return [round(n * step, 10) for n in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]


class Axes:
    """The scales of a chart: numbers to pixels."""

    def __init__(self, x, y):
        """x, y: the (lowest, highest) number."""
        self.x_range, self.y_range = ((low, high if high > low else low + 1) for low, high in (x, y))

    def x(self, value):
        low, high = self.x_range
        return round(LEFT + (WIDTH - LEFT - 12) * (value - low) / (high - low), 1)

    def y(self, value):
        low, high = self.y_range
        return round((HEIGHT - BELOW) - (HEIGHT - BELOW - 10) * (value - low) / (high - low), 1)

    def ticks(self):
        """The ticks of both axes, for the template: [(pixel, label)] each."""
        return {
            "x_ticks": [(self.x(value), f"{value:g}") for value in ticks(*self.x_range)],
            "y_ticks": [(self.y(value), f"{value:g}") for value in ticks(*self.y_range)],
        }


def line_chart(title, words, lines, level=None):
    """A chart of Dice against annotations for the template, or None without points.

    words: its alternative text; lines: a list of (label, mark, points), a point being (annotations, Dice, filled), Dice
    None where it was not measured; level: draw a line at this Dice."""
    lines = [(label, mark, [point for point in points if point[1] is not None]) for label, mark, points in lines]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    xs, ys = ([point[n] for *_, points in lines for point in points] for n in (0, 1))
    ys = [*ys, *([level] if level else [])]
    axes = Axes((min(xs), max(xs)), (np.floor(10 * min(ys)) / 10, min(1.0, np.ceil(10 * max(ys) + 0.01) / 10)))
    drawn = [
        (label, mark, [(axes.x(x), axes.y(y), filled) for x, y, filled in points]) for label, mark, points in lines
    ]
    table = ". ".join(f"{label}: {', '.join(f'{y:.3f}' for _, y, _ in points)}" for label, _, points in lines)
    return {
        "title": title,
        "alt": f"{words} Dice from {min(xs)} to {max(xs)} annotations. {table}.",
        "lines": drawn,
        "level": axes.y(level) if level else None,
        "x_label": "annotations",
        "y_label": "Dice",
        **axes.ticks(),
    }


def number(text):
    """A cell of a csv file as a float, None if it is empty."""
    return float(text) if text else None


def dice_chart(history):
    """Dice on the test images."""
    points = [(int(row["annotations"]), number(row["dice"]), not int(row["pseudo_labels"])) for row in history]
    pseudo = " Open marks: trained with pseudo-labels too." if any(not filled for *_, filled in points) else ""
    title = f"Dice on the test images.{pseudo}"
    return line_chart(title, "Dice on the test images against annotations.", [("test images", "o", points)])


def quality_chart(history, quality):
    """Dice of the proposals of each group with the answers."""

    def points(column):
        # The network that proposed was trained on the annotations of the iteration before.
        pairs = zip(history, quality[1:])
        return [(int(before["annotations"]), number(row[column]), True) for before, row in pairs]

    lines = [("all answers", "o", points("dice"))]
    lines += [(NAMES[group], MARKS[group], points(f"dice_{group}")) for group in COMPARED]
    title = "Dice of the network's proposals with the answers, before it was trained on them"
    return line_chart(title, f"{title}.", lines)


def stability_chart(history, quality):
    """Dice of the masks of pool images with those of the iteration before."""
    points = [(int(row["annotations"]), number(of["stability"]), True) for row, of in zip(history, quality)]
    title = f"Dice of the pool's masks with those of the iteration before; the level is {STABLE}"
    return line_chart(title, f"{title}.", [("masks of the pool", "o", points)], STABLE)


def score_chart(scores, dice, groups):
    """The histogram of an iteration's scores for the template, with the groups' limits and the selected images."""
    _, _, counts, edges = ceal.histogram(scores)
    axes = Axes((edges[0], edges[-1]), (0, np.log1p(max(counts))))
    low, high = sorted(ceal.random_range(counts, edges))
    limits = [
        ("random from", low),
        ("random to", high),
        ("most uncertain from", edges[ceal.BINS - ceal.UNCERTAIN_BINS]),
    ]
    levels = [count * 10**n for n in range(9) for count in (1, 2, 5) if count * 10**n <= max(counts)]
    levels = [0, *(levels if len(levels) <= 6 else levels[::3])]
    selected = {NAMES[group]: len(at) for group, at in groups.items() if len(at)}
    listed = ", ".join(f"{count} {name}" for name, count in selected.items())
    return {
        "alt": f"Histogram of the {len(scores)} scores from {edges[0]:.3g} to {edges[-1]:.3g}, most of them near "
        f"{edges[np.argmax(counts)]:.3g}. Selected: {listed}.",
        "bars": [
            (axes.x(left), axes.y(np.log1p(count)), round(axes.x(right) - axes.x(left), 1))
            for left, right, count in zip(edges, edges[1:], counts)
            if count
        ],
        "limits": [(axes.x(value), f"{name} {value:.3g}") for name, value in limits],
        "rows": [
            (NAMES[group], MARKS[group], [axes.x(score) for score in scores[at]])
            for group, at in groups.items()
            if len(at)
        ],
        **axes.ticks(),
        "y_ticks": [(axes.y(np.log1p(count)), f"{count}") for count in levels],
    }


# ---------------------------------------------------------------------------------------------------- the figures


def draw_selection(trainer, iteration, folder):
    """Begin to draw scores.png and examples.png of the selection in an iteration's folder, with the network that scored
    the pool. Returns a figures.Drawing."""
    if not (folder / "scores.csv").exists() or (folder / "scores.png").exists():  # drawn by an earlier version
        return Drawing([])
    ids, scores, dice, groups = read_selection(folder)
    position = {id: n for n, id in enumerate(trainer.dataset.ids)}
    candidates = np.array([position[id] for id in ids])
    jobs = [(figure_scores, (scores, dice, groups, *ceal.histogram(scores)[2:]), folder / "scores.png")]
    if examples := find_examples(trainer, candidates, scores, dice, groups, iteration):
        jobs.append((figure_examples, (examples,), folder / "examples.png"))
    return Drawing(jobs, beside=trainer.one_gpu)


def find_examples(trainer, candidates, scores, dice, groups, iteration, each=2, shown=3):
    """The paper's Fig. 1 for `each` images of every group: image, truth, the first `shown` passes, the mean of all
    passes and the uncertainty map. Returns a list for figures.figure_examples."""
    examples = []
    for group, selected in groups.items():
        if not len(at := selected[:each]):
            continue
        mean, variance = trainer.uncertainty(candidates[at], iteration)
        # Sums of the first 0, 1, 2, ... passes: the difference of two is one pass.
        sums = [0.0, *(n * trainer.uncertainty(candidates[at], iteration, passes=n)[0] for n in range(1, shown + 1))]
        images, masks = (read(candidates[at]) for read in (trainer.dataset.images, trainer.dataset.masks))
        rated = ["no truth" if np.isnan(dice[n]) else f"Dice {dice[n]:.2f}" for n in at]
        ids = trainer.dataset.ids[candidates[at]]
        titles = [f"{id}\nscore {scores[n]:.3g}, {words}" for id, n, words in zip(ids, at, rated)]
        truths = [None if np.isnan(dice[n]) else mask for n, mask in zip(at, masks)]
        passes = zip(*(after - before for before, after in itertools.pairwise(sums)))
        examples.append((group, list(zip(titles, images, truths, passes, mean, variance))))
    return examples


def draw_overview(trainer, pool, history, run):
    """overview.png: the curve, the last selection, and masks of test images from the worst to the best (of pool images
    if there are none for test)."""
    dataset, tested, shown = trainer.dataset, bool(history[-1]["dice"]), 8
    if tested:
        rows = read_csv(run / f"iteration_{len(history) - 1:02d}" / "test.csv")
        order = pool.test[np.argsort([float(row["dice"]) for row in rows], kind="stable")]
    else:
        order = pool.unlabelled if len(pool.unlabelled) else pool.training_set()[0]
    positions = order[np.unique(np.linspace(0, len(order) - 1, shown).astype(int))]
    predictions = trainer.predict(positions) > 0.5
    truths = [mask if there else None for mask, there in zip(dataset.masks(positions), dataset.has_mask[positions])]
    dice = segmentation_metrics(dataset.masks(positions), predictions)["dice"]
    names = [id if mask is None else f"{id}, Dice {d:.2f}" for id, mask, d in zip(dataset.ids[positions], truths, dice)]
    examples = list(zip(names, dataset.images(positions), predictions, truths))
    result = f", Dice {float(history[-1]['dice']):.3f} on {len(pool.test)} test images" if tested else ""
    title = f"{run}: {len(history) - 1} iterations, {history[-1]['annotations']} annotations{result}"
    last = read_last_selection(run, len(history))
    figure_overview(title, history if tested else None, last, examples, run / "overview.png")


if __name__ == "__main__":
    with Dataset(sys.argv[2]) as dataset:
        sys.stdout.buffer.write(make_page(Path(sys.argv[1]), dataset, "done" in sys.argv[3:]).encode())
