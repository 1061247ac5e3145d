"""The oracle: it gives masks for the selected images, from the data file or from a person who works in a folder.

Every accepted answer of a person is kept in annotations.h5. Nothing here knows how a network is trained.
"""

import contextlib
import io
import itertools
import shlex
import sys
import time
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from answers import NO_PROPOSALS, PROPOSALS, README, draw_overlay, read_answers, save_plain, write_table
from pictures import (
    inverted_warning,
    mask_cover,
    open_mask,
    open_picture,
    orientation,
    other_way,
    resize_map,
    shrink_mask,
    upright,
)
from utils import (
    UserError,
    open_hdf5,
    print_error,
    print_warning,
    read_csv,
    segmentation_metrics,
    whole_file,
    whole_folder,
)


class Answers(NamedTuple):
    """The answers of an oracle in one iteration."""

    positions: np.ndarray  # of the images with a mask
    masks: np.ndarray  # uint8 0/1 (n, H, W), in the order of `positions`
    rejected: np.ndarray  # positions of the rejected images


class SimulatedOracle:
    """Answers with the masks of the data file. read_masks: positions -> uint8 0/1 (n, H, W)."""

    refused = False  # whether an answer was refused

    def __init__(self, read_masks):
        self._read_masks = read_masks

    def collect(self):
        """There is nothing to collect."""

    def ask(self, iteration, groups, propose=None):
        """There is nothing to wait for."""

    def answers(self, iteration, asked):
        """The Answers for these positions, in the same order."""
        return Answers(asked, self._read_masks(asked), np.array([], int))


class Unanswered(Exception):
    """Raised when annotations are missing. `invalid`: whether any submitted mask was rejected."""

    def __init__(self, invalid):
        super().__init__()
        self.invalid = invalid


def find_oracle(config, dataset, parts, run, switches):
    """The oracle of a run. Raises UserError if the data file lacks a mask that a SimulatedOracle needs."""
    if config.oracle == "folder":
        switches = {name: switches[name] for name in ("wait", "partial", "correct")}
        return FolderOracle(run, dataset, last=config.iterations, **switches)
    needed = np.concatenate([parts.initial, parts.pool])
    missing = needed[~dataset.has_mask[needed]]
    if len(missing):
        raise UserError(
            f"{dataset.path}: {dataset.ids[missing[0]]} has no mask ({len(missing)} such images among those for "
            "--initial and --pool); let a person draw them with --oracle folder"
        )
    return SimulatedOracle(dataset.masks)


# ----------------------------------------------------------------------------------------------- a person with a folder


class Answer(NamedTuple):
    id: str
    iteration: int  # the first in which it counts
    hash: str  # of the mask file
    rejection: str  # the reason, or empty if there is a mask


TEXT = h5py.string_dtype()
TABLE = {"ids": TEXT, "iterations": np.dtype(int), "hashes": TEXT, "rejections": TEXT}  # of annotations.h5


def kind(answer):
    """What an Answer is, in words."""
    return "rejection" if answer.rejection else "mask"


def same(answer, other):
    """Whether two Answers are the same mask file, or both rejections."""
    return (answer.hash, kind(answer)) == (other.hash, kind(other))


def mask_names(rows):
    """Yield the name that the mask of each Answer of annotations.h5 has there, if it has one."""
    seen = set()
    for number, answer in enumerate(rows):
        yield f"corrections/{number}" if answer.id in seen else f"masks/{answer.id}"
        seen.add(answer.id)


class FolderOracle:
    """Asks a person for masks in RUN/annotate/iteration_KK/ and keeps every answer in RUN/annotations.h5.

    annotations.h5 has one row per answer: `ids`, `iterations` (the first in which it counts), `hashes` (of the mask
    file) and `rejections` (the reason, or empty). The mask is uint8 0/1 at the size received: `masks/ID`, or
    `corrections/ROW` for another answer to the same image (ROW: the number of its row). In iteration K the last row of
    an image with an iteration <= K is used; no row or mask is ever changed. The attribute `closed` is the last
    iteration that waits for no more answers. To add answers, a new file replaces the old one.
    """

    POLL = 5  # seconds

    def __init__(self, run, dataset, last, wait=False, partial=False, correct=False):
        """run: the run's folder, a Path; dataset: a data.Dataset; last: the run's last iteration; wait: wait until
        every image is answered; partial: continue with some answers; correct: accept changes of answers in use.
        Raises UserError if annotations.h5 is damaged or belongs to other images."""
        self.run, self.dataset, self.last = run, dataset, last
        self.wait, self.partial, self.correct = wait, partial, correct
        self.path, self.refused, self._reported = run / "annotations.h5", False, set()
        self.tell = lambda: None  # called whenever answers are missing
        self._positions = {id: position for position, id in enumerate(dataset.ids)}
        self._rows, self._answers, self._closed = [], {}, -1  # the Answer of each row, and the last one of each id
        if self.path.exists():
            self._load()

    @contextlib.contextmanager
    def _reading(self):
        """Open annotations.h5 for reading. Raises UserError if it is damaged."""
        try:
            with open_hdf5(self.path) as file:
                yield file
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path}: damaged, or from another run ({error}); restore it from a copy")

    def _load(self):
        with self._reading() as file:
            self._closed = int(file.attrs["closed"])
            columns = [(file[name].asstr() if dtype == TEXT else file[name])[:] for name, dtype in TABLE.items()]
            self._rows = [Answer(*row) for row in zip(*columns, strict=True)]
            self._answers = {answer.id: answer for answer in self._rows}
            drawn = [name for name, answer in zip(mask_names(self._rows), self._rows) if not answer.rejection]
            if self._answers.keys() - self._positions.keys() or not all(name in file for name in drawn):
                raise ValueError("images are missing")

    def ask(self, iteration, groups, propose=None):
        """Ask for masks of these images. Raises Unanswered if answers are missing and may not be waited for.

        groups: a dict of group to positions. propose: positions -> an iterable of (probabilities, uncertainty map),
        float32 (H, W) each; None before the first training.
        """
        if iteration <= self._closed:
            return
        folder = self.run / "annotate" / f"iteration_{iteration:02d}"
        ids = [self.dataset.ids[position] for positions in groups.values() for position in positions]
        new = bool(ids) and not folder.exists()
        if new:
            self._write_folder(folder, groups, propose)
            print(f"{folder}: draw masks of {len(ids)} images as its README.txt explains", flush=True)
        while True:
            state = self._state()
            wrong = self.collect()
            missing = [id for id in ids if id not in self._answers]
            # While an answer is refused, its image must not be trained on: the correct answer may come too late then.
            if not (missing or wrong) or (self.partial and self._enough(iteration, ids)):
                break
            self.tell()
            if not self.wait:
                for id in () if new else missing:
                    print(f"missing: {folder / 'masks' / id}.png")
                raise Unanswered(self.refused)
            print(f"{len(ids) - len(missing)} of {len(ids)} images are answered; watching {folder}", flush=True)
            self._watch(state)
        self._append([], iteration)

    def _enough(self, iteration, ids):
        """Whether there is at least one answer; before the first training it must be a mask."""
        answers = [self._answers[id] for id in ids if id in self._answers]
        return any(iteration or not answer.rejection for answer in answers)

    def _state(self):
        """The times and sizes of the files that a person adds or changes."""
        state, folder = set(), self.run / "annotate"
        for path in (*folder.glob("*/masks/*"), *folder.glob("*/queries.csv")):
            with contextlib.suppress(OSError):  # deleted in the meantime
                state.add((path, path.stat().st_mtime_ns, path.stat().st_size))
        return state

    def _watch(self, state):
        """Return when the files differ from `state` and have stopped changing."""
        before = now = state
        while now == state or now != before:
            time.sleep(self.POLL)
            before, now = now, self._state()

    def answers(self, iteration, asked):
        """The Answers that count from this iteration on: those for the positions `asked`, in their order, then late
        answers for images of earlier iterations, and corrections of answers that counted before."""
        named = zip(mask_names(self._rows), self._rows)
        mine = {self._positions[row.id]: (name, row) for name, row in named if row.iteration == iteration}
        order = [*(position for position in asked if position in mine), *sorted(mine.keys() - set(asked))]
        drawn = np.array([position for position in order if not mine[position][1].rejection], int)
        rejected = np.array([position for position in order if mine[position][1].rejection], int)
        size = self.dataset.height, self.dataset.width
        masks = np.empty((len(drawn), *size), np.uint8)
        if len(drawn):
            with self._reading() as file:
                for mask, position in zip(masks, drawn):
                    mask[:] = shrink_mask(Image.fromarray(255 * file[mine[position][0]][:]), *size)
        return Answers(drawn, masks, rejected)

    # Checking and keeping the answers.

    def collect(self):
        """Accept all correct new answers, of any iteration. Prints and returns what is wrong, a list of sentences."""
        wrong, before = [], len(self._rows)
        self._append(self._accepted(wrong), self._closed)
        if len(self._rows) > before:
            unused = "; no iteration is left that could use them" if self._closed >= self.last else ""
            print(f"{self.path}: {len(self._rows) - before} answers accepted{unused}", flush=True)
        for line in wrong:
            if line not in self._reported:
                print_error(line)
        self._reported.update(wrong)
        self.refused |= bool(wrong)
        return wrong

    def _accepted(self, wrong):
        """Yield (Answer, mask or None) of each new or changed answer that is correct; append what is wrong to the list
        `wrong`. Prints warnings and changes, before the answers are written."""
        covers = []
        for id, (folder, given) in self._handed_in(wrong).items():
            try:
                answer, content = self._identify(id, given)
                earlier = self._answers.get(id)
                if earlier and same(earlier, answer):
                    continue
                place = folder / "queries.csv" if answer.rejection else given
                if earlier and earlier.iteration <= self._closed:
                    self._require_correctable(place, earlier, answer)
                mask = None if answer.rejection else self._read_mask(given, content, self._positions[id])
            except UserError as error:
                wrong.append(str(error))
                continue
            if earlier:
                since = f", from iteration {answer.iteration} on" if earlier.iteration < answer.iteration else ""
                print(f"{place}: this {kind(answer)} of {id} replaces the earlier {kind(earlier)}{since}", flush=True)
            if mask is not None:
                covers.append((given.name, *mask_cover(mask)))
                self._warn_if_turned(given, folder, id, mask)
            yield answer, mask
        if warning := inverted_warning(covers):
            print_warning(f"{self.run / 'annotate'}: {warning}")

    def _handed_in(self, wrong):
        """What is in the person's folders: a dict of id to (the iteration's folder, what `read_answers` returns for
        it). Appends what is wrong to the list `wrong`. A queries.csv that is missing is written anew."""
        found = {}
        for folder in sorted((self.run / "annotate").glob("iteration_*")):
            asked = self._asked(folder.name)
            if asked and folder.is_dir() and not (folder / "queries.csv").exists():
                write_table(folder, asked)
                print(f"{folder / 'queries.csv'} was missing and is written anew, without answers", flush=True)
            answers, mistakes = read_answers(folder, [id for id, _ in asked], self._positions)
            wrong += mistakes
            for id, given in answers.items():
                found.setdefault(id, []).append((folder, given))
        return {id: places[-1] for id, places in found.items() if self._agree(id, places, wrong)}

    def _agree(self, id, places, wrong):
        """Whether the answers to an image that was in several iterations' folders are the same; else it is wrong."""
        if len(places) == 1:
            return True
        try:
            first, *others = (self._identify(id, given)[0] for _, given in places)
        except UserError as error:
            wrong.append(str(error))
            return False
        if all(same(first, other) for other in others):
            return True
        wrong.append(f"{places[0][0]} and {places[-1][0]} hold different answers for {id}; remove one of them")
        return False

    def _asked(self, name):
        """The (id, group) of the images to annotate in an iteration, a list. name: of its folder."""
        for place in (self.run / name.replace("iteration", ".queries"), self.run / name):
            if (place / "queries.csv").exists():
                try:
                    rows = [(row["id"], row["group"]) for row in read_csv(place / "queries.csv")]
                    return [(id, group) for id, group in rows if group != "pseudo"]
                except (KeyError, ValueError) as error:
                    raise UserError(f"{place}/queries.csv: not as train.py wrote it ({error}); restore it")
        return []

    def _identify(self, id, given):
        """The Answer for a mask's Path or a rejection's reason, a str, and the content of the mask file, bytes."""
        if isinstance(given, str):
            return Answer(id, self._closed + 1, "", given), b""
        try:
            content = given.read_bytes()
        except OSError as error:
            raise UserError(f"{given}: cannot be read ({error.strerror}); save it again")
        return Answer(id, self._closed + 1, blake2b(content, digest_size=16).hexdigest(), ""), content

    def _require_correctable(self, place, earlier, answer):
        """Raise UserError unless an answer that is in use may be changed."""
        kept = f"{place}: {answer.id} is answered already; the earlier {kind(earlier)} is kept"
        if answer.iteration > self.last:
            raise UserError(f"{kept}, because no iteration is left that could use a correction")
        if not self.correct:
            raise UserError(f"{kept}; with --correct, this {kind(answer)} counts from iteration {answer.iteration} on")

    def _read_mask(self, path, content, position):
        """The mask in the file, uint8 0/1 at its own size. Raises UserError if it does not fit this image."""
        picture = open_mask(path, io.BytesIO(content))
        original, size = tuple(self.dataset.original_sizes[position]), (self.dataset.height, self.dataset.width)
        if picture.size[::-1] not in (original, size):
            found, expected = ("{} rows x {} columns".format(*shape) for shape in (picture.size[::-1], original))
            raise UserError(f"{path}: the mask has {found}, its image has {expected}; draw it on the image in images/")
        if not shrink_mask(picture, *size).any():
            raise UserError(f"{path}: the mask is empty or too small; draw the lesion, or reject the image")
        return (np.asarray(picture) > 0).astype(np.uint8)

    def _warn_if_turned(self, path, folder, id, mask):
        """Warn if this mask fits the proposal in `folder` far better when drawn on the pixels as the camera saved them,
        before the turn that the orientation of the image requires."""
        with contextlib.suppress(UserError, OSError):  # the original or the proposal is gone: nothing to compare
            with open_picture(Path(self.dataset.folder, self.dataset.files[self._positions[id]])) as picture:
                found = orientation(picture)
            proposal = open_mask(folder / "proposed" / f"{id}.png")
            other = mask if found is None else other_way(mask, found)
            if found is None or other.shape != mask.shape:
                return
            size = self.dataset.height, self.dataset.width
            masks = np.stack([shrink_mask(Image.fromarray(255 * way), *size) for way in (mask, other)])
            here, there = segmentation_metrics(masks, np.stack(2 * [shrink_mask(proposal, *size)]))["dice"]
            if there >= here + 0.3:
                print_warning(
                    f"{path}: taken as drawn on the image as displayed, but it fits the proposed mask far better the "
                    f"other way (Dice {there:.2f}, not {here:.2f}); was it drawn in a program that ignores the image's "
                    "orientation (EXIF)? Then draw it on the image in images/"
                )

    def _append(self, answers, closed):
        """Write a new annotations.h5 with these additional answers, (Answer, mask or None). Does nothing if there are
        none and `closed` is unchanged."""
        answers = iter(answers)
        first = list(itertools.islice(answers, 1))
        if not first and closed == self._closed:
            return
        # In memory, because h5py crashes if the disk is full; 10,000 masks take about 100 MB.
        buffer, rows = io.BytesIO(self.path.read_bytes() if self.path.exists() else b""), [*self._rows]
        with h5py.File(buffer, "a") as file:
            file.attrs["closed"] = closed
            file.require_group("masks")
            for answer, mask in (*first, *answers):
                if mask is not None:
                    name = f"corrections/{len(rows)}" if answer.id in self._answers else f"masks/{answer.id}"
                    file.create_dataset(name, data=mask, compression="gzip")
                rows.append(answer)
            before = len(self._rows)
            for (name, dtype), column in zip(TABLE.items(), zip(*rows) if rows else [()] * len(TABLE)):
                table = file.require_dataset(name, (before,), dtype, maxshape=(None,))
                table.resize((len(rows),))
                table[before:] = column[before:]
        with whole_file(self.path) as partial:
            partial.write_bytes(buffer.getbuffer())
        self._rows, self._closed = rows, closed
        self._answers = {answer.id: answer for answer in rows}

    # Writing the folder for the person.

    def _write_folder(self, folder, groups, propose):
        """Write annotate/iteration_KK, completely or not at all."""
        asked = [(self.dataset.ids[at], group, at) for group, positions in groups.items() for at in positions]
        maps = propose([at for *_, at in asked]) if propose else itertools.repeat(None)
        with whole_folder(folder) as partial:
            for name in ("images", "masks", *(("proposed", "overlay") if propose else ())):
                (partial / name).mkdir()
            for (id, _, position), proposal in zip(asked, maps):
                self._write_image(partial, id, position, proposal)
            write_table(partial, [(id, group) for id, group, _ in asked])
            command = f"python {shlex.quote(sys.argv[0])} --run {shlex.quote(str(self.run))}"
            proposals = PROPOSALS if propose else NO_PROPOSALS
            text = README.format(count=len(asked), proposals=proposals, cwd=Path.cwd(), command=command)
            (partial / "README.txt").write_text(text, encoding="utf-8")

    def _write_image(self, folder, id, position, proposal):
        """Write images/ID and, if there is a proposal, proposed/ID.png and overlay/ID.png."""
        file, size = self.dataset.files[position], tuple(map(int, self.dataset.original_sizes[position]))
        if not file:
            picture = Image.fromarray(self.dataset.images([position])[0].squeeze())
            picture.save(folder / "images" / f"{id}.png")
        else:
            original = Path(self.dataset.folder, file)
            try:
                content = original.read_bytes()
            except OSError as error:
                raise UserError(f"{original}: the image cannot be read ({error.strerror}); put it back where it was")
            with open_picture(original, io.BytesIO(content)) as picture:
                turned = orientation(picture)
                picture = upright(picture)
            if turned:
                save_plain(picture, folder / "images" / f"{id}.png")
            else:
                (folder / "images" / f"{id}{original.suffix}").write_bytes(content)
        if picture.size[::-1] != size:
            raise UserError(f"{original}: the image is no longer {size[0]}x{size[1]}; restore the original file")
        if proposal:
            lesion = resize_map(proposal[0], size) > 0.5
            Image.fromarray(np.uint8(255) * lesion).save(folder / "proposed" / f"{id}.png")
            draw_overlay(picture, *proposal).save(folder / "overlay" / f"{id}.png")
