"""answers.py: what spreadsheet programs do to the table of a person's folder, and whose mask a file is."""

import pytest

from answers import read_answers, read_rejections, write_table
from utils import write_csv

NAMES = ["IMG_1", "0012", "1E05", "3-12", "20240131123456789012", "MAR1", "2024-01-05"]


def write(path, cells, reject="IMG_1", delimiter=",", encoding="utf-8"):
    """A table with these ids; `reject` is rejected."""
    rows = [("id", "group", "answer"), *((id, "random", "reject: blurred" if id == reject else "") for id in cells)]
    path.write_bytes("".join(delimiter.join(row) + "\r\n" for row in rows).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("id", "cell", "how"),
    [
        ("0012", "12", "leading zeros"),
        ("1E05", "100000", "a number"),
        ("1E05", "1.00E+05", "a number"),
        ("20240131123456789012", "2.02401E+19", "rounded"),
        ("20240131123456789012", "20240131123456700000", "rounded"),
        ("3-12", "12-Mar", "a date"),
        ("3-12", "03. Dez", "a date"),
        ("MAR1", "01-Mar", "a date"),
        ("2024-01-05", "05/01/2024", "a date"),
    ],
)
def test_an_id_that_a_spreadsheet_program_changed_is_explained_and_nothing_is_taken(tmp_path, id, cell, how):
    cells = [cell if name == id else name for name in NAMES]
    for reject in "IMG_1", cell, None:
        path = write(tmp_path / "queries.csv", cells, reject)
        rejections, (line,) = read_rejections(path, NAMES)
        assert rejections == {}
        assert line.startswith(f"{path}: a spreadsheet program changed the id {id} to {cell} (")
        assert how in line
        assert "move the file aside and start again" in line


@pytest.mark.parametrize(
    ("asked", "cells", "words"),
    [
        (["0012", "12"], ["12", "12"], "changed the id 0012 to 12 "),  # the rejection of 0012 is not one of 12
        (["A", "B"], ["A"], "the id B is missing"),
        (["A", "B"], ["A", "B", "A"], "the id 'A' is there twice"),
        (["A", "B"], ["A", "B", "C"], "the id 'C' is not in the list"),
        (["1001", "1002"], ["1002", "1002"], "the id 1001 is missing"),
        (["é1", "B"], ["È1", "B"], "the id é1 is missing, and 'È1' is not an id"),
    ],
)
def test_a_missing_unknown_or_doubled_id_is_named_and_nothing_is_taken(tmp_path, asked, cells, words):
    rejections, (line,) = read_rejections(write(tmp_path / "queries.csv", cells, cells[-1]), asked)
    assert rejections == {}
    assert words in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_read_as_spreadsheet_programs_save_it(tmp_path, delimiter, encoding):
    asked = ["é 1", "0012"]
    path = write(tmp_path / "queries.csv", [*asked, ""], "é 1", delimiter, encoding)  # with an empty row
    assert read_rejections(path, asked) == ({"é 1": "blurred"}, [])


def test_utf_16_of_another_byte_order_is_read(tmp_path):
    path = write(tmp_path / "queries.csv", ["A", "B"], "B", "\t", "utf-8")
    path.write_bytes(b"\xfe\xff" + path.read_bytes().decode().encode("utf-16-be"))
    assert read_rejections(path, ["A", "B"]) == ({"B": "blurred"}, [])


def test_short_lines_and_reordered_columns_are_read(tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("group,answer,id\nrandom\nrandom,,A\nrandom,reject: blurred,B\n")
    assert read_rejections(path, {"A", "B"}) == ({"B": "blurred"}, [])


def test_spaces_around_an_id_are_kept_or_removed_alike(tmp_path):
    for cells in ["A ", " B"], ["A", "B"]:
        path = write(tmp_path / "queries.csv", cells, cells[0])
        assert read_rejections(path, ["A ", " B"]) == ({"A ": "blurred"}, [])


def test_masks_are_taken_even_if_the_table_is_not(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "0012.png").touch()
    write(tmp_path / "queries.csv", ["12", "B"], "12")
    answers, wrong = read_answers(tmp_path, ["0012", "B"])
    assert (answers, len(wrong)) == ({"0012": tmp_path / "masks" / "0012.png"}, 1)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("IMG_1.png", "IMG_1"),
        ("img_1_SEGMENTATION.PNG", "IMG_1"),
        ("a.b.png", "a.b"),
        ("x.png", "x"),
        ("X_segmentation.tif", "X"),
        ("IMG_1.2.png", None),
        ("IMG_10.png", None),
        ("a.png", None),
        ("IMG_1.3", "IMG_1.3"),  # an id with a dot, and no suffix
        ("img_2.png", None),  # another image of the data set has this name
    ],
)
def test_a_mask_is_never_taken_for_another_image(tmp_path, name, id):
    asked = ["IMG_1", "IMG_1.3", "IMG_2", "a.b", "x", "X"]
    write_csv(tmp_path / "queries.csv", ["id", "group", "answer"], [(asked_id, "random", "") for asked_id in asked])
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / name).touch()
    answers, wrong = read_answers(tmp_path, asked, [*asked, "img_2"])
    assert (list(answers), len(wrong)) == (([id], 0) if id else ([], 1))


@pytest.mark.parametrize(
    "table",
    [
        "id,group,answer,note\nA,random,,\nB,random,,reject: blurred\n",
        "id,group,answer\nA,random,\nB,reject: blurred,\n",
        "note,id,answer\n,A,\nreject: blurred,B,\n",
    ],
)
def test_a_rejection_in_another_column_is_not_ignored(tmp_path, table):
    path = tmp_path / "queries.csv"
    path.write_text(table)
    rejections, wrong = read_rejections(path, ["A", "B"])
    assert rejections == {}
    assert wrong == [f"{path}: 'reject: blurred' is not in the column answer; move it there"]


def test_an_image_whose_name_begins_with_reject_is_not_rejected(tmp_path):
    write_table(tmp_path, [("rejected_17", "random"), ("B", "random")])
    assert read_rejections(tmp_path / "queries.csv", ["rejected_17", "B"]) == ({}, [])


@pytest.mark.parametrize("name", ["A.png~", "A.kra", "A.xcf", "A.png.bak"])
def test_a_rejection_counts_whatever_the_editor_left_of_the_mask(tmp_path, name):
    (tmp_path / "queries.csv").write_text("id,answer\nA,reject: bl\0urred\n")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / name).touch()
    assert read_answers(tmp_path, ["A"]) == ({"A": "blurred"}, [])
    (tmp_path / "masks" / "A.png").touch()
    answers, (line,) = read_answers(tmp_path, ["A"])
    assert answers == {}
    assert "A is also rejected" in line


@pytest.mark.parametrize("place", ["link", "file"])
def test_a_folder_of_masks_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, place):
    write_table(tmp_path, [("A", "random")])
    if place == "link":
        (tmp_path / "masks").symlink_to(tmp_path / "unmounted")
    else:
        (tmp_path / "masks").touch()
    answers, wrong = read_answers(tmp_path, ["A"])
    assert answers == {}
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{tmp_path / 'masks'}: cannot be read")
