"""What a person answers, whatever the person works with: checking the answers, and keeping them in annotations.h5.

Nothing here knows where the answers come from, or how a network is trained.
"""

import contextlib
import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from answers import save_plain
from pictures import inverted_warning, mask_cover, open_picture, orientation, shrink_mask, upright
from utils import UserError, open_hdf5, print_error, print_warning, whole_file


class Answers(NamedTuple):
    """The answers of an oracle in one iteration."""

    positions: np.ndarray  # of the images with a mask
    masks: np.ndarray  # uint8 0/1 (n, H, W), in the order of `positions`
    rejected: np.ndarray  # positions of the rejected images


class Unanswered(Exception):
    """Raised when annotations are missing. `invalid`: whether any submitted mask was rejected."""

    def __init__(self, invalid):
        super().__init__()
        self.invalid = invalid


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


class Submitted(NamedTuple):
    """What a person has handed in for an image."""

    answer: Answer
    place: str | Path  # where it was found, for messages
    name: str  # of the mask, for messages
    read: Callable  # returns the mask, uint8 0/1 at its own size; raises UserError if it does not fit the image
    examine: Callable = lambda mask: None  # prints warnings about a mask that is accepted


class PersonOracle:
    """Asks a person for masks and keeps every answer in RUN/annotations.h5.

    annotations.h5 has one row per answer: `ids`, `iterations` (the first in which it counts), `hashes` (of the mask, as
    received) and `rejections` (the reason, or empty). The mask is uint8 0/1 at the size received: `masks/ID`, or
    `corrections/ROW` for another answer to the same image (ROW: the number of its row). In iteration K the last row of
    an image with an iteration <= K is used; no row or mask is ever changed. The attribute `closed` is the last
    iteration that waits for no more answers. To add answers, a new file replaces the old one.

    A subclass says how images are handed out and answers come back: `_hand_out`, `_submitted`, `_state`, and for
    messages `_address` and `_place`.
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

    def _hand_out(self, iteration, asked, propose):
        """Give the images to the person, unless they have them. asked: a list of (id, group, position). Returns whether
        the person has them only now, so that no answer is expected yet."""
        raise NotImplementedError

    def _submitted(self, wrong):
        """Yield a Submitted for each image with an answer, the earlier ones included. Appends what is wrong to the list
        `wrong`."""
        raise NotImplementedError

    def _state(self):
        """Any value that differs when the person has added or changed an answer."""
        raise NotImplementedError

    def _address(self, iteration=None):
        """Where the person works, for messages; iteration: on its images."""
        raise NotImplementedError

    def _place(self, iteration, id):
        """Where the answer for an image is expected, for messages."""
        raise NotImplementedError

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
        asked = [(self.dataset.ids[at], group, at) for group, positions in groups.items() for at in positions]
        ids = [id for id, *_ in asked]
        new = bool(ids) and self._hand_out(iteration, asked, propose)
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
                    print(f"missing: {self._place(iteration, id)}")
                raise Unanswered(self.refused)
            answered = len(ids) - len(missing)
            print(f"{answered} of {len(ids)} images are answered; watching {self._address(iteration)}", flush=True)
            self._watch(state)
        self._append([], iteration)

    def _enough(self, iteration, ids):
        """Whether there is at least one answer; before the first training it must be a mask."""
        answers = [self._answers[id] for id in ids if id in self._answers]
        return any(iteration or not answer.rejection for answer in answers)

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
            unused = "; only --final-steps can still use them" if self._closed >= self.last else ""
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
        for answer, place, name, read, examine in self._submitted(wrong):
            earlier = self._answers.get(answer.id)
            if earlier and same(earlier, answer):
                continue
            try:
                if earlier and not answer.rejection and self._is_kept(answer.id, read):
                    continue
                if earlier and earlier.iteration <= self._closed:
                    self._require_correctable(place, earlier, answer)
                mask = None if answer.rejection else read()
            except UserError as error:
                wrong.append(str(error))
                continue
            if earlier:
                since = f", from iteration {answer.iteration} on" if earlier.iteration < answer.iteration else ""
                replaced = f"this {kind(answer)} of {answer.id} replaces the earlier {kind(earlier)}{since}"
                print(f"{place}: {replaced}", flush=True)
            if mask is not None:
                covers.append((name, *mask_cover(mask)))
                examine(mask)
            yield answer, mask
        if warning := inverted_warning(covers):
            print_warning(f"{self._address()}: {warning}")

    def _is_kept(self, id, read):
        """Whether a mask equals the last answer to this image, although its file is another."""
        name = dict(zip((row.id for row in self._rows), mask_names(self._rows)))[id]
        if self._answers[id].rejection:
            return False
        with self._reading() as file:
            return np.array_equal(read(), file[name][:])

    def _answer(self, id, hash, rejection):
        """The Answer with this content, if it is accepted now."""
        return Answer(id, self._closed + 1, hash, rejection)

    def _require_correctable(self, place, earlier, answer):
        """Raise UserError unless an answer that is in use may be changed."""
        kept = f"{place}: {answer.id} is answered already; the earlier {kind(earlier)} is kept"
        if not self.correct:
            since = (
                f"from iteration {answer.iteration} on" if answer.iteration <= self.last else "for --final-steps alone"
            )
            raise UserError(f"{kept}; with --correct, this {kind(answer)} counts {since}")

    def _require_fitting(self, place, picture, position, remedy):
        """Raise UserError if this mask, a Pillow image of mode L, does not fit its image, or is empty."""
        original, size = tuple(self.dataset.original_sizes[position]), (self.dataset.height, self.dataset.width)
        if picture.size[::-1] not in (original, size):
            found, expected = ("{} rows x {} columns".format(*shape) for shape in (picture.size[::-1], original))
            raise UserError(f"{place}: the mask has {found}, its image has {expected}; {remedy}")
        if not shrink_mask(picture, *size).any():
            raise UserError(f"{place}: the mask is empty or too small; draw the lesion, or reject the image")

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
            self._require_unchanged(file)
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

    def _require_unchanged(self, file):
        """Raise UserError if annotations.h5, an open h5py.File, is not as this process has read or written it."""
        ids = file["ids"].asstr()[:].tolist() if "ids" in file else []
        if (ids, int(file.attrs.get("closed", -1))) != ([row.id for row in self._rows], self._closed):
            raise UserError(f"{self.path}: another program has changed or removed it since it was read; run this again")

    # Images for the person.

    def _upright(self, position, kept):
        """An image as the person gets it: upright, a Pillow image; the content of its file; its suffix. The file is
        copied if it is upright and its suffix is in `kept` (None: any suffix), and PNG otherwise."""
        file, size = self.dataset.files[position], tuple(map(int, self.dataset.original_sizes[position]))
        if not file:
            picture, copied = Image.fromarray(self.dataset.images([position])[0].squeeze()), False
        else:
            original = Path(self.dataset.folder, file)
            try:
                content = original.read_bytes()
            except OSError as error:
                raise UserError(f"{original}: the image cannot be read ({error.strerror}); put it back where it was")
            with open_picture(original, io.BytesIO(content)) as picture:
                copied = orientation(picture) is None and (kept is None or picture.format in kept)
                picture = upright(picture)
        if picture.size[::-1] != size:
            raise UserError(f"{original}: the image is no longer {size[0]}x{size[1]}; restore the original file")
        if copied:
            return picture, content, original.suffix
        buffer = io.BytesIO()
        save_plain(picture, buffer)
        return picture, buffer.getvalue(), ".png"
