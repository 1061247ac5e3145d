"""The files of a folder for a person: what the person gets, and the answers that the person puts there.

Nothing here knows the run, or which answers are kept.
"""

import codecs
import csv
import io
import math
import os
import re
from collections import Counter

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from pictures import BACKUPS, IGNORED, LOSSY_SUFFIXES, SUFFIXES, resize_map
from utils import composed, write_csv

LOSSLESS = SUFFIXES - LOSSY_SUFFIXES  # of masks
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
DATE = re.compile(rf"\d{{1,4}}([-./ ])\d{{1,2}}(\1\d{{1,4}})?|(\d{{1,2}}[-./ ]?)?({MONTHS})[a-z]*[-./ ]?\d*", re.I)

# --------------------------------------------------------------------------------------------- the files for the person

README = """\
Please draw the lesion on {count} images

What is in this folder
  images       the images
  masks        an empty folder for your masks (a mask is a picture that shows where the lesion is)
  queries.csv  a list of the images; use it to reject an image
{proposals}
For each image
  1. Open the image in a program that can draw masks, for example GIMP, ITK-SNAP, napari, CVAT or Label Studio.
     Draw on the images of this folder, which are turned upright, and not on the original photographs.
  2. Paint the lesion white and all the rest black. Use no grey and no soft edges. Keep the size of the picture.
  3. Save the result in the folder masks as a PNG file with the name of the image: the mask of ABC.jpg is ABC.png.
     Save one flat picture without layers and without transparency, white on black. Do not save it as JPG.

If you cannot use an image
  Do not draw a mask. Open queries.csv in a spreadsheet program or a text editor. Find the line of the image. In the
  column `answer`, write `reject:` and the reason, for example

      reject: not a lesion

  Save the file as csv. You will not get this image again. A spreadsheet program changes names that look like numbers
  or dates (0012 becomes 12): import the column `id` as text, or use a text editor.

When you have finished, or to check your work
  Run this command, or ask the person who gave you this folder to run it, in the folder {cwd}

      {command}

  It checks all masks, keeps the correct ones, and lists what is missing or wrong. You can then add the rest.
  With --partial at its end, the command continues without the rest.

If you find a mistake later
  Save a better mask in place of the old one, or delete the mask and reject the image. Then run the command again. If
  the computer has already learned from the old answer, the command says so; run it with --correct at its end.
"""
PROPOSALS = """\
  proposed     a mask of each image, drawn by the computer. If it is right, copy it to the folder masks. If it is
               nearly right, copy it and correct the copy. Otherwise draw your own.
  overlay      the images with the outline of that mask in cyan; where it is red, the computer is not sure
"""
NO_PROPOSALS = """\
  The computer has no proposed masks yet, because it has not seen any masks.
"""


def write_table(folder, asked):
    """Write the person's queries.csv. asked: a list of (id, group)."""
    write_csv(folder / "queries.csv", ["id", "group", "answer"], [(id, group, "") for id, group in asked])


def save_plain(picture, file):
    """Save the pixels of an upright picture as PNG, with its colour profile but without EXIF or other metadata.

    file: a path or a file object."""
    mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode in ("1", "L") else "RGB"
    plain, profile = picture.convert(mode), picture.info.get("icc_profile") if picture.mode == mode else None
    plain.info = {}
    plain.save(file, "PNG", icc_profile=profile)


def draw_overlay(picture, probabilities, uncertainty, longest=1024):
    """The picture with the outline at 0.5 in cyan and the uncertainty in red; its longer side is at most `longest`."""
    picture = picture.convert("RGBA").convert("RGB")  # directly, Pillow warns about transparent palettes
    picture.thumbnail((longest, longest))
    size = picture.size[::-1]
    lesion, doubt = resize_map(probabilities, size) > 0.5, resize_map(uncertainty, size)
    red = 0.7 * doubt[..., None] / max(doubt.max(), 0.01)  # no red if all is certain
    pixels = np.asarray(picture) * (1 - red) + np.array([255, 0, 0]) * red
    pixels[binary_dilation(lesion) & ~binary_erosion(lesion, border_value=1)] = 0, 255, 255
    return Image.fromarray(pixels.round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------- the person's answers


def read_answers(folder, asked, ids=()):
    """Read the answers in a folder. asked: the ids of the images to annotate; ids: those of all images.

    Returns a dict of id to the mask's Path or the rejection's reason, a str, and what is wrong, a list of sentences."""
    rejections, wrong = read_rejections(folder / "queries.csv", asked)
    masks, find = {}, finder(asked, ids)
    try:
        names = sorted(os.listdir(folder / "masks"))
    except OSError as error:
        names = []
        if (folder / "masks").is_symlink() or not isinstance(error, FileNotFoundError):  # not merely removed
            wrong.append(f"{folder / 'masks'}: cannot be read ({error.strerror}); restore it, or give access to it")
    for path in (folder / "masks" / name for name in names):
        if path.name.startswith(".") or path.name.lower() in IGNORED:
            continue
        if not path.is_file():
            wrong.append(f"{path}: not a file; put the mask files directly into {path.parent}")
        elif id := find(path.name):
            masks.setdefault(id, []).append(path)
        else:
            wrong.append(f"{path}: no image in queries.csv has this name; give the mask its image's name")
    for id in rejections.keys() & masks.keys():  # what an editor left of a deleted mask is no mask
        masks[id] = [path for path in masks[id] if path.suffix.lower() in SUFFIXES | {""}]
    masks = {id: paths for id, paths in masks.items() if paths}
    answers = {id: reason for id, reason in rejections.items() if id not in masks}
    for id, paths in masks.items():
        path, *others = [path for path in paths if path.suffix.lower() in LOSSLESS] or paths[:1]
        if others:
            wrong.append(f"{path} and {others[0]} are both for {id}; remove one of them")
        elif path.name.lower().endswith(BACKUPS):
            wrong.append(f"{path}: a backup copy is not used as a mask; save the mask as {id}.png")
        elif id in rejections:
            wrong.append(f"{path}: {id} is also rejected in queries.csv; remove the mask or the rejection")
        else:
            answers[id] = path
    return answers, wrong


def finder(asked, ids):
    """A function of a mask's file name to the id of its image in `asked`, or None. ids: those of all images.

    The mask is ID or ID_segmentation with any suffix. Upper and lower case may differ where no other id is meant."""
    asked = set(asked)
    similar = Counter(id.casefold() for id in asked.union(ids))
    by_case = {id.casefold(): id for id in asked if similar[id.casefold()] == 1}

    def find(name):
        stem, suffix = os.path.splitext(composed(name))
        inner, inner_suffix = os.path.splitext(stem)
        beside = suffix.lower() not in LOSSLESS and inner_suffix.lower() in SUFFIXES  # for example ID.png.bak
        stems = [stem, inner] if beside else [stem]
        stems = stems if suffix.lower() in SUFFIXES else [composed(name), *stems]  # what follows a dot may be of the id
        stems = [short for stem in stems for short in (stem, re.sub("_segmentation$", "", stem, flags=re.IGNORECASE))]
        exact = [stem for stem in stems if stem in asked]
        return (exact or [by_case[stem.casefold()] for stem in stems if stem.casefold() in by_case] or [None])[0]

    return find


def read_rejections(path, asked):
    """Read the rejections in queries.csv: a dict of id to reason, and what is wrong, a list of sentences. If the ids
    are not exactly those of `asked`, no answer is read: it could be meant for another image.

    The file may have another separator or encoding, because spreadsheet programs save it so."""
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        return {}, [f"{path}: cannot be read ({error.strerror}); restore it, with the columns id and answer"]
    ids = set(asked)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count))
    try:
        header, *rows = [row for row in table if row]
        header = [cell.strip() for cell in header]
        id_column, column = header.index("id"), header.index("answer")
    except (ValueError, csv.Error):
        return {}, [f"{path}: its first line lacks the columns id and answer; {NEW_TABLE}"]
    given, misplaced, names = [], [], {id.strip(): id for id in asked}
    for row in rows:
        row += [""] * (len(header) - len(row))  # a spreadsheet program may omit empty cells
        cells = [row[column], *row[len(header) :]]  # a reason with commas
        answer = ", ".join(filter(None, (cell.strip() for cell in cells)))
        id = composed(row[id_column])
        id = id if id in ids else names.get(id.strip(), id.strip())
        others = {*range(len(header))} - {column, *([id_column] if id in ids else ())}  # an id may begin with "reject"
        elsewhere = [row[n] for n in sorted(others) if REJECT.match(row[n].strip())]
        if elsewhere and not answer:
            misplaced.append(f"{path}: {elsewhere[0]!r} is not in the column answer; move it there")
        if id or answer:
            given.append((id, answer))
    if damage := difference([id for id, _ in given], asked):
        return {}, [f"{path}: {damage}, so none of its answers is taken; {NEW_TABLE}"]
    rejections, wrong = {}, misplaced
    for id, answer in given:
        match = REJECT.fullmatch(answer)
        if match:
            rejections[id] = match[1].replace("\0", "") or "no reason given"
        elif answer:
            wrong.append(f"{path}: the answer {answer!r} for {id!r}: write `reject: REASON` or nothing")
    return rejections, wrong


REJECT = re.compile("reject(?:ed)?[ :]*(.*)", re.IGNORECASE | re.DOTALL)
NEW_TABLE = (
    "move the file aside and start again, which writes it anew; then copy your answers into it with a text editor, or "
    "with its column id imported as text"
)


def decode(content):
    """The text of a csv file in UTF-8, UTF-16 with a byte order mark, or a Windows encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def difference(found, asked):
    """How the ids found in queries.csv differ from those asked for, in words, or None if each is there once."""
    counts, expected = Counter(found), set(asked)
    missing = [id for id in asked if id not in counts]
    strange = [id for id, count in counts.items() if id not in expected or count > 1]
    for id in missing:
        for cell in strange:
            if how := spreadsheet_change(id, cell):
                return f"a spreadsheet program changed the id {id} to {cell} ({how})"
    if missing:
        return f"the id {missing[0]} is missing" + (f", and {strange[0]!r} is not an id" if strange else "")
    if strange:
        return f"the id {strange[0]!r} is " + ("there twice" if strange[0] in expected else "not in the list")
    return None


def spreadsheet_change(id, cell):
    """What a spreadsheet program did if it shows the id as this cell, in words, or None if it did not."""
    try:
        number, shown = float(id), float(cell.replace(",", "."))
    except ValueError:
        dated = DATE.fullmatch(id) and set(map(int, re.findall(r"\d+", id))) & set(map(int, re.findall(r"\d+", cell)))
        return "it read a date" if dated else None
    if id.startswith("0") and (id.lstrip("0") or "0") == cell:
        return "it removed the leading zeros"
    rounded = len(id) > 15 or "e" in cell.lower()
    if not math.isclose(number, shown, rel_tol=0.01 if rounded else 0):
        return None
    return "it read a number and rounded it" if len(id) > 15 else "it read a number"
