"""The oracle: it gives masks for the selected images, from the data file or from a person.

Nothing here knows how a network is trained.
"""

import contextlib
import functools
import io
import itertools
import re
import shlex
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from annotations import Answers, PersonOracle, Submitted, Unanswered, same
from answers import NO_PROPOSALS, PROPOSALS, README, draw_overlay, read_answers, write_table
from pictures import open_mask, open_picture, orientation, other_way, resize_map, shrink_mask
from utils import UserError, print_warning, read_csv, segmentation_metrics, whole_folder

__all__ = ["FolderOracle", "SimulatedOracle", "Unanswered", "find_oracle"]


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


def find_oracle(config, dataset, parts, run, switches):
    """The oracle of a run. Raises UserError if the data file lacks a mask that a SimulatedOracle needs."""
    switches = {name: switches[name] for name in ("wait", "partial", "correct")}
    if config.oracle == "folder":
        return FolderOracle(run, dataset, last=config.iterations, **switches)
    if config.oracle == "labelstudio":
        from labelstudio import LabelStudioOracle  # here, because its library takes time to import

        return LabelStudioOracle(run, dataset, config.iterations, config.labelstudio, **switches)
    needed = np.concatenate([parts.initial, parts.pool])
    missing = needed[~dataset.has_mask[needed]]
    if len(missing):
        raise UserError(
            f"{dataset.path}: {dataset.ids[missing[0]]} has no mask ({len(missing)} such images among those for "
            "--initial and --pool); let a person draw them with --oracle folder or labelstudio"
        )
    return SimulatedOracle(dataset.masks)


# ----------------------------------------------------------------------------------------------- a person with a folder


class FolderOracle(PersonOracle):
    """Asks a person for masks in RUN/annotate/iteration_KK/."""

    def _address(self, iteration=None):
        """The folder of all iterations, or of one."""
        return self.run / "annotate" / ("" if iteration is None else f"iteration_{iteration:02d}")

    def _place(self, iteration, id):
        return self._address(iteration) / "masks" / f"{id}.png"

    def _state(self):
        """The times and sizes of the files that a person adds or changes."""
        state, folder = set(), self.run / "annotate"
        for path in (*folder.glob("*/masks/*"), *folder.glob("*/queries.csv")):
            with contextlib.suppress(OSError):  # deleted in the meantime
                state.add((path, path.stat().st_mtime_ns, path.stat().st_size))
        return state

    # Reading the answers.

    def _submitted(self, wrong):
        for id, (folder, given) in self._handed_in(wrong).items():
            try:
                answer, content = self._identify(id, given)
            except UserError as error:
                wrong.append(str(error))
                continue
            if answer.rejection:
                yield Submitted(answer, folder / "queries.csv", "", None)
            else:
                read = functools.partial(self._read_mask, given, content, self._positions[id])
                yield Submitted(
                    answer, given, given.name, read, functools.partial(self._warn_if_turned, given, folder, id)
                )

    def _handed_in(self, wrong):
        """What is in the person's folders: a dict of id to (the iteration's folder, what `read_answers` returns for
        it). Appends what is wrong to the list `wrong`. A queries.csv that is missing is written anew."""
        found = {}
        for folder in sorted((self.run / "annotate").glob("iteration_*")):
            if not re.fullmatch(r"iteration_\d+", folder.name):  # a copy, or a zip file of it
                if folder.is_dir():
                    wrong.append(f"{folder}: not a folder of this run; move its masks to that of the iteration")
                continue
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
            return self._answer(id, "", given), b""
        try:
            content = given.read_bytes()
        except OSError as error:
            raise UserError(f"{given}: cannot be read ({error.strerror}); save it again")
        return self._answer(id, blake2b(content, digest_size=16).hexdigest(), ""), content

    def _read_mask(self, path, content, position):
        """The mask in the file, uint8 0/1 at its own size. Raises UserError if it does not fit this image."""
        picture = open_mask(path, io.BytesIO(content))
        self._require_fitting(path, picture, position, "draw it on the image in images/")
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

    # Writing the folder for the person.

    def _hand_out(self, iteration, asked, propose):
        folder = self._address(iteration)
        if folder.exists():
            return False
        self._write_folder(folder, asked, propose)
        print(f"{folder}: draw masks of {len(asked)} images as its README.txt explains", flush=True)
        return True

    def _write_folder(self, folder, asked, propose):
        """Write annotate/iteration_KK, completely or not at all."""
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
            (partial / "README.txt").write_text(text, encoding="utf-8", errors="surrogateescape")

    def _write_image(self, folder, id, position, proposal):
        """Write images/ID and, if there is a proposal, proposed/ID.png and overlay/ID.png."""
        picture, content, suffix = self._upright(position, kept=None)
        (folder / "images" / f"{id}{suffix}").write_bytes(content)
        if proposal:
            lesion = resize_map(proposal[0], picture.size[::-1]) > 0.5
            Image.fromarray(np.uint8(255) * lesion).save(folder / "proposed" / f"{id}.png")
            draw_overlay(picture, *proposal).save(folder / "overlay" / f"{id}.png")
