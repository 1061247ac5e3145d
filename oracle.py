"""The oracle: who answers when the run asks for masks. Simulated from known masks, or a person with a folder.

Every accepted answer is kept in annotations.h5. Nothing here knows how a network is trained.
"""

import contextlib
import csv
import io
import itertools
import re
import shlex
import time
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from pictures import open_mask, open_picture, resize_map, shrink_mask, upright
from utils import UserError, composed, print_error, read_csv, whole_file, whole_folder, write_csv


class Answers(NamedTuple):
    """What an oracle has answered in one iteration."""

    positions: np.ndarray  # of the images that have got a mask
    masks: np.ndarray  # uint8 0/1 (n, H, W), in their order
    rejected: np.ndarray  # positions of the images that are of no use


class SimulatedOracle:
    """Answers with the masks that are known already. read_masks: positions -> uint8 0/1 (n, H, W)."""

    def __init__(self, read_masks):
        self._read_masks = read_masks

    def collect(self):
        """Nothing is handed in."""

    def ask(self, iteration, groups, propose=None):
        """Nothing has to be waited for."""

    def answers(self, iteration, asked):
        """The Answers to these positions, in their order."""
        return Answers(asked, self._read_masks(asked), np.array([], int))


class Unanswered(Exception):
    """Raised when annotations are missing. `invalid`: whether any submitted mask was rejected."""

    def __init__(self, invalid):
        super().__init__()
        self.invalid = invalid


def find_oracle(config, dataset, parts, run, switches):
    """The oracle of a run, one of the above. Raises UserError if a SimulatedOracle would not know an answer."""
    if config.oracle == "folder":
        return FolderOracle(run, dataset, **switches)
    to_know = np.concatenate([parts.initial, parts.pool])
    unknown = to_know[~dataset.has_mask[to_know]]
    if len(unknown):
        raise UserError(
            f"{dataset.path}: {dataset.ids[unknown[0]]} has no mask ({len(unknown)} such images among those for "
            "--initial and --pool): have a person draw them with --oracle folder"
        )
    return SimulatedOracle(dataset.masks)


# ----------------------------------------------------------------------------------------------- a person with a folder


class Answer(NamedTuple):
    iteration: int  # in which it counts first
    hash: str  # of the mask's file
    rejection: str  # the reason; empty: there is a mask


TEXT = h5py.string_dtype()
TABLE = {"ids": TEXT, "iterations": np.dtype(int), "hashes": TEXT, "rejections": TEXT}  # of annotations.h5


class FolderOracle:
    """Asks a person, in RUN/annotate/iteration_KK/, and keeps every answer in RUN/annotations.h5.

    annotations.h5 has a row per answer, `ids`, `iterations` (in which it counts first), `hashes` (of the mask's file)
    and `rejections` (the reason, or empty); `masks/ID`, uint8 0/1 at the size it came in; and the attribute `closed`,
    the last iteration that waits for no more. Answers are only ever added, in a new file that replaces the old one.
    """

    POLL = 5  # seconds

    def __init__(self, run, dataset, wait=False, partial=False):
        """run: the run's folder, a Path; dataset: a data.Dataset; wait: watch the folder until all is answered;
        partial: make do with what is answered. Raises UserError if annotations.h5 is damaged, or of other images."""
        self.run, self.dataset, self.wait, self.partial = run, dataset, wait, partial
        self.path, self._told = run / "annotations.h5", set()
        self._positions = {id: position for position, id in enumerate(dataset.ids)}
        self._answers, self._closed = {}, -1
        if self.path.exists():
            self._load()

    @contextlib.contextmanager
    def _reading(self):
        """The file annotations.h5; raises UserError if it turns out to be damaged."""
        try:
            with h5py.File(self.path) as file:
                yield file
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path}: damaged, or of another run ({error}); put back a copy of it")

    def _load(self):
        with self._reading() as file:
            self._closed = int(file.attrs["closed"])
            ids, *columns = ((file[name].asstr() if kind == TEXT else file[name])[:] for name, kind in TABLE.items())
            self._answers = {id: Answer(*answer) for id, *answer in zip(ids, *columns, strict=True)}
            drawn = {id for id, answer in self._answers.items() if not answer.rejection}
            if self._answers.keys() - self._positions.keys() or drawn - set(file["masks"]):
                raise ValueError("images are missing")

    def ask(self, iteration, groups, propose=None):
        """Have these images answered, or raise Unanswered where that has to be waited for.

        groups: a dict of group to positions. propose: positions -> an iterable of (probabilities, uncertainty map),
        float32 (H, W) each; None: the network knows nothing yet.
        """
        if iteration <= self._closed:
            return
        folder = self.run / "annotate" / f"iteration_{iteration:02d}"
        ids = [self.dataset.ids[position] for positions in groups.values() for position in positions]
        new = bool(ids) and not folder.exists()
        if new:
            self._write_folder(folder, groups, propose)
            print(f"{folder}: masks of {len(ids)} images are asked for; do as its README.txt says", flush=True)
        while True:
            state = self._state()
            wrong = self.collect()
            missing = [id for id in ids if id not in self._answers]
            if not missing or (self.partial and self._suffice(iteration, ids)):
                break
            if not self.wait:
                for id in () if new else missing:
                    print(f"missing: {folder / 'masks' / id}.png")
                raise Unanswered(bool(wrong))
            print(f"{len(ids) - len(missing)} of {len(ids)} images are answered; watching {folder}", flush=True)
            self._watch(state)
        self._append([], iteration)

    def _suffice(self, iteration, ids):
        """Whether something is answered; before the first training it must be a mask."""
        answers = [self._answers[id] for id in ids if id in self._answers]
        return any(iteration or not answer.rejection for answer in answers)

    def _state(self):
        """What there is to collect: it differs when something has been handed in or is being written."""
        state, folder = set(), self.run / "annotate"
        for path in (*folder.glob("*/masks/*"), *folder.glob("*/queries.csv")):
            with contextlib.suppress(OSError):  # gone in the meantime
                state.add((path, path.stat().st_mtime_ns, path.stat().st_size))
        return state

    def _watch(self, state):
        """Return when what there is differs from `state` and nobody is writing."""
        before = now = state
        while now == state or now != before:
            time.sleep(self.POLL)
            before, now = now, self._state()

    def answers(self, iteration, asked):
        """The Answers that count from this iteration on: those to the positions `asked`, in their order, then others,
        which were asked for earlier."""
        mine = {self._positions[id]: answer for id, answer in self._answers.items() if answer.iteration == iteration}
        order = [*(position for position in asked if position in mine), *sorted(mine.keys() - set(asked))]
        drawn = np.array([position for position in order if not mine[position].rejection], int)
        rejected = np.array([position for position in order if mine[position].rejection], int)
        size = self.dataset.height, self.dataset.width
        masks = np.empty((len(drawn), *size), np.uint8)
        if len(drawn):
            with self._reading() as file:
                for mask, id in zip(masks, self.dataset.ids[drawn]):
                    mask[:] = shrink_mask(Image.fromarray(255 * file["masks"][id][:]), *size)
        return Answers(drawn, masks, rejected)

    # What is handed in, is checked and kept.

    def collect(self):
        """Take in what is right of all that was handed in, whenever it was asked for; returns and prints what is wrong,
        a list of sentences."""
        wrong, before = [], len(self._answers)
        self._append(self._accepted(wrong), self._closed)
        if len(self._answers) > before:
            print(f"{self.path}: {len(self._answers) - before} answers taken in", flush=True)
        for line in wrong:
            if line not in self._told:
                print_error(line)
        self._told.update(wrong)
        return wrong

    def _accepted(self, wrong):
        """Yield (id, Answer, mask or None) of what is right and new; what is wrong is added to the list `wrong`."""
        known = dict(self._answers)
        for folder in sorted((self.run / "annotate").glob("iteration_*")):
            handed_in, mistakes = read_answers(folder, self._asked(folder.name))
            wrong += mistakes
            for id, given in handed_in.items():
                try:
                    answer, content = self._identify(given)
                    if id not in known:
                        mask = None if answer.rejection else self._read_mask(given, content, self._positions[id])
                        known[id] = answer
                        yield id, answer, mask
                    elif (known[id].hash, known[id].rejection != "") != (answer.hash, answer.rejection != ""):
                        kept = "rejection" if known[id].rejection else "mask"
                        place = folder / "queries.csv" if answer.rejection else given
                        wrong.append(f"{place}: {id} was taken in already; the earlier {kept} is kept")
                except UserError as error:
                    wrong.append(str(error))

    def _asked(self, name):
        """The ids that were asked for in an iteration, by its folder's name."""
        for place in (self.run / name.replace("iteration", ".queries"), self.run / name):
            if (place / "queries.csv").exists():
                try:
                    return {row["id"] for row in read_csv(place / "queries.csv") if row["group"] != "pseudo"}
                except (KeyError, ValueError) as error:
                    raise UserError(f"{place}/queries.csv: not as train.py wrote it ({error}); put it back")
        return set()

    def _identify(self, given):
        """A new Answer of the mask's Path or the reason of a rejection, and the mask's file, bytes."""
        if isinstance(given, str):
            return Answer(self._closed + 1, "", given), b""
        try:
            content = given.read_bytes()
        except OSError as error:
            raise UserError(f"{given}: cannot be read ({error.strerror})")
        return Answer(self._closed + 1, blake2b(content, digest_size=16).hexdigest(), ""), content

    def _read_mask(self, path, content, position):
        """The mask in the file, uint8 0/1 at its own size. Raises UserError if it is not one of this image."""
        picture = open_mask(path, io.BytesIO(content))
        original, size = tuple(self.dataset.original_sizes[position]), (self.dataset.height, self.dataset.width)
        if picture.size[::-1] not in (original, size):
            found, expected = ("{} rows x {} columns".format(*shape) for shape in (picture.size[::-1], original))
            raise UserError(f"{path}: the mask has {found} and its image {expected}; draw it on the image in images/")
        if not shrink_mask(picture, *size).any():
            raise UserError(f"{path}: the mask is empty, or a speck; draw the lesion, or reject the image")
        return (np.asarray(picture) > 0).astype(np.uint8)

    def _append(self, answers, closed):
        """Write annotations.h5 anew with more answers, (id, Answer, mask or None), if there are any or it is another
        iteration that is closed."""
        answers = iter(answers)
        first = list(itertools.islice(answers, 1))
        if not first and closed == self._closed:
            return
        # In memory, because h5py crashes on a disk that is full; 10,000 masks take some 100 MB.
        buffer, new = io.BytesIO(self.path.read_bytes() if self.path.exists() else b""), {}
        with h5py.File(buffer, "a") as file:
            file.attrs["closed"] = closed
            masks = file.require_group("masks")
            for id, answer, mask in (*first, *answers):
                new[id] = answer
                if mask is not None:
                    masks.create_dataset(id, data=mask, compression="gzip")
            rows = [(id, *answer) for id, answer in new.items()]
            for (name, kind), column in zip(TABLE.items(), zip(*rows) if rows else [()] * len(TABLE)):
                table = file.require_dataset(name, (len(self._answers),), kind, maxshape=(None,))
                table.resize((len(self._answers) + len(rows),))
                table[len(self._answers) :] = column
        with whole_file(self.path) as partial:
            partial.write_bytes(buffer.getbuffer())
        self._answers.update(new)
        self._closed = closed

    # What is asked for is written down.

    def _write_folder(self, folder, groups, propose):
        """The folder annotate/iteration_KK, whole: images, proposals, an empty masks/, queries.csv and README.txt."""
        asked = [(self.dataset.ids[at], group, at) for group, positions in groups.items() for at in positions]
        maps = propose([at for *_, at in asked]) if propose else itertools.repeat(None)
        with whole_folder(folder) as partial:
            for name in ("images", "masks", *(("proposed", "overlay") if propose else ())):
                (partial / name).mkdir()
            for (id, _, position), proposal in zip(asked, maps):
                self._write_image(partial, id, position, proposal)
            write_csv(partial / "queries.csv", ["id", "group", "answer"], [(id, group, "") for id, group, _ in asked])
            command = f"python train.py --run {shlex.quote(str(self.run))}"
            proposals = PROPOSALS if propose else NO_PROPOSALS
            text = README.format(count=len(asked), proposals=proposals, cwd=Path.cwd(), command=command)
            (partial / "README.txt").write_text(text, encoding="utf-8")

    def _write_image(self, folder, id, position, proposal):
        """images/ID, and, where the network proposes something, proposed/ID.png and overlay/ID.png."""
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
            (folder / "images" / f"{id}{original.suffix}").write_bytes(content)
            with open_picture(original, io.BytesIO(content)) as picture:
                picture = upright(picture)
        if picture.size[::-1] != size:
            raise UserError(f"{original}: is not the image that it was ({size[0]}x{size[1]}); put that back")
        if proposal:
            lesion = resize_map(proposal[0], size) > 0.5
            Image.fromarray(np.uint8(255) * lesion).save(folder / "proposed" / f"{id}.png")
            draw_overlay(picture, *proposal).save(folder / "overlay" / f"{id}.png")


# ----------------------------------------------------------------------------------------------- what a person is given

README = """\
{count} images need a mask of the lesion

What is here
  images/      the images
  masks/       empty: your masks go here
  queries.csv  the list of the images, in which an image can be rejected
{proposals}
For each image
  1. Open images/NAME in a program that can draw masks, such as GIMP, ITK-SNAP, napari, CVAT or Label Studio.
  2. If proposed/NAME.png is right, copy it to masks/NAME.png. If it is nearly right, copy it and correct the copy.
     Else, or if nothing is proposed, draw the lesion and save the mask as masks/NAME.png.
  The mask has as many rows and columns as the image shows, white where there is lesion and black where there is
  skin, and nothing else: no grey, no soft edge. It has the image's name and ends in .png (never .jpg).
  If a mask lies turned on its image, the program ignores how the camera was held: use another program.

If an image cannot be used
  Draw no mask. Open queries.csv with a spreadsheet program or a text editor, write into the column `answer` of the
  image's line

      reject: not a lesion        or        reject: unreadable        or any other reason after `reject:`

  and save it as csv. The image will not be asked for again.

When you are done, or want to know what is still missing
  Run this, or tell the person who does, in the folder {cwd}

      {command}

  It checks every mask and names what is missing or wrong. What is right is kept; the rest can follow. With --partial
  added it goes on without the rest. A mask that was taken in stays as it is, even if you change its file later.
"""
PROPOSALS = """\
  proposed/    a mask of each image that the network proposes
  overlay/     the image with the outline of that mask in cyan; the redder, the less sure is the network
"""
NO_PROPOSALS = """\
  There is no proposed/ and no overlay/ yet: the network has not seen any mask.
"""


def draw_overlay(picture, probabilities, uncertainty, longest=1024):
    """The picture, its longer side at most `longest`, with the outline at 0.5 in cyan and the uncertainty in red."""
    picture = picture.convert("RGBA").convert("RGB")  # straight to RGB Pillow warns of transparent palettes
    picture.thumbnail((longest, longest))
    size = picture.size[::-1]
    lesion, doubt = resize_map(probabilities, size) > 0.5, resize_map(uncertainty, size)
    red = 0.7 * doubt[..., None] / max(doubt.max(), 0.01)  # where nothing is uncertain, nothing is red
    pixels = np.asarray(picture) * (1 - red) + np.array([255, 0, 0]) * red
    pixels[binary_dilation(lesion) & ~binary_erosion(lesion, border_value=1)] = 0, 255, 255
    return Image.fromarray(pixels.round().astype(np.uint8))


# ----------------------------------------------------------------------------------------------- what a person hands in


def read_answers(folder, asked):
    """What a person has put into a folder of FolderOracle: a dict of id to the mask's Path, or to the reason for which
    the image is rejected, a str; and what is wrong, a list of sentences. asked: the ids that may be answered."""
    rejections, wrong = read_rejections(folder / "queries.csv", asked)
    masks = {}
    for path in sorted((folder / "masks").glob("*")):
        id = composed(path.stem)
        if path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini"):
            continue
        if not path.is_file():
            wrong.append(f"{path}: no file; put the masks themselves into {path.parent}")
        elif id not in asked:
            wrong.append(f"{path}: no image of this name was asked for; give the mask its image's name")
        else:
            masks.setdefault(id, []).append(path)
    answers = {id: reason for id, reason in rejections.items() if id not in masks}
    for id, (path, *others) in masks.items():
        if others:
            wrong.append(f"{path} and {others[0]} are both for {id}: remove one of them")
        elif id in rejections:
            wrong.append(f"{path}: {id} is rejected in queries.csv as well; remove the mask or the rejection")
        else:
            answers[id] = path
    return answers, wrong


def read_rejections(path, asked):
    """The rejections in a folder's queries.csv, a dict of id to reason, and what is wrong in it, a list of sentences.

    As a spreadsheet program may have saved it: with another separator, or in an encoding of Windows."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return {}, [f"{path}: cannot be read ({error.strerror}); put it back, with the columns id and answer"]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count))
    try:
        header, *rows = [[cell.strip() for cell in row] for row in table if row]
        id_column, column = header.index("id"), header.index("answer")
    except (ValueError, csv.Error):
        return {}, [f"{path}: its first line lacks the columns id and answer; put them back"]
    rejections, wrong = {}, []
    for row in rows:
        row += [""] * (len(header) - len(row))  # a spreadsheet program may leave out empty cells
        id, answer = row[id_column], ", ".join(filter(None, [row[column], *row[len(header) :]]))  # it may have a comma
        match = re.fullmatch("reject(?:ed)?[ :]*(.*)", answer, re.IGNORECASE | re.DOTALL)
        if match and id in asked:
            rejections[id] = match[1] or "no reason given"
        elif answer:
            known = "write `reject: REASON`, or nothing" if id in asked else "no such image was asked for"
            wrong.append(f"{path}: the answer {answer!r} for {id!r}: {known}")
    return rejections, wrong
