"""labelstudio.py and brush.py: a person in a browser. The server is a small one that answers as Label Studio does."""

import dataclasses
import io
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, blobs
from fake_label_studio import LEGACY, PERSONAL, FakeLabelStudio
from PIL import Image
from skimage.draw import disk
from test_oracle import rows

import data
import train
from annotations import Unanswered
from brush import Unreadable, decode, encode, fill, join
from config import read_command_line, read_config
from labelstudio import TOKEN, LabelStudioOracle
from pictures import shrink_mask
from run_folder import change_settings, write_json
from utils import UserError, read_csv, write_csv

REAL = ROOT / ".venv-labelstudio" / "bin" / "python"
SIZE, SMALL = (64, 96), (32, 48)  # of the photographs, and of the network
OPTIONS = """
    --preset demo --filters 2 --initial 6 --pool 20 --test 4 --initial-epochs 1 --active-epochs 1 --batch-size 4
    --passes 2 --iterations 1 --no-detection 1 --most-uncertain 1 --random 1 --pseudo-start 1 --pseudo-first 2
"""


# ---------------------------------------------------------------------------------------------------- regions and masks


def bits(*parts):
    """The bytes of a bit stream, a list of int. parts: strings of 0 and 1."""
    stream = "".join(parts)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[n : n + 8], 2) for n in range(0, len(stream), 8)]


HEAD = f"{1 * 2 * 4:032b}", "00111", "0010", "0011", "0111", "1111"  # 8 values of 8 bits; widths 3, 4, 8, 16
CODES = {  # of a picture of 1x2 pixels, the second is lesion
    "two runs": bits(*HEAD, "1", "00", "011", f"{0:08b}", "1", "00", "011", f"{255:08b}"),
    "a wide run": bits(*HEAD, "1", "11", f"{3:016b}", f"{0:08b}", "1", "10", f"{3:08b}", f"{255:08b}"),
    "no run": bits(*HEAD, "0", "01", "0111", *(f"{v:08b}" for v in (255, 0, 0, 127, 255, 0, 0, 128))),
    "only opacity counts": bits(*HEAD, "1", "00", "110", f"{0:08b}", "0", "00", "000", f"{200:08b}"),
}


@pytest.mark.parametrize("name", CODES)
def test_a_brush_region_is_read_as_its_format_says(name):
    assert decode(CODES[name], 1, 2).tolist() == [[False, True]]


def some_masks():
    rng = np.random.default_rng(1)
    ring = np.zeros((60, 50), bool)
    ring[disk((30, 25), 20)], ring[disk((30, 25), 8)] = True, False
    return {
        "one pixel": np.ones((1, 1), bool),
        "empty": np.zeros((5, 3), bool),
        "noise": rng.random((31, 17)) > 0.5,
        "a hole": ring,
        "runs above 2**16 values": np.ones((150, 120), bool),
    }


@pytest.mark.parametrize("name", some_masks())
def test_a_mask_survives_the_brush_format(name):
    mask = some_masks()[name]
    np.testing.assert_array_equal(decode(encode(mask), *mask.shape), mask)
    assert set(map(type, encode(mask))) == {int}


# Reads masks and their codes, and writes what Label Studio's own converter makes of them.
REFERENCE = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle, mask2rle
for mask, code in json.load(sys.stdin):
    print(json.dumps([np.array(decode_rle(code)).tolist(), mask2rle(np.uint8(255) * np.array(mask, np.uint8))]))
"""


@pytest.mark.skipif(not REAL.exists(), reason="Label Studio is not installed (make test-labelstudio installs it)")
def test_label_studios_own_converter_reads_and_writes_the_same():
    masks = some_masks().values()
    given = json.dumps([(mask.astype(int).tolist(), encode(mask)) for mask in masks])
    done = subprocess.run([REAL, "-c", REFERENCE], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for mask, line in zip(masks, done.stdout.splitlines(), strict=True):
        read, written = json.loads(line)
        found = np.array(read).reshape(*mask.shape, 4)
        np.testing.assert_array_equal(found, np.repeat(255 * mask[..., None], 4, axis=2))
        np.testing.assert_array_equal(decode(written, *mask.shape), mask)


@pytest.mark.parametrize(
    "code", [None, "abc", [], [1], [300], CODES["two runs"][:-1], CODES["no run"][:-2], [0] * 80, CODES["two runs"][:9]]
)
def test_a_damaged_brush_region_is_refused(code):
    with pytest.raises(Unreadable):
        decode(code, 1, 2)


def test_a_polygon_is_filled_to_its_pixels_centres():
    quarter = fill([(0, 0), (50, 0), (50, 50), (0, 50)], 4, 6)
    assert quarter.astype(int).tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0] * 6] * 2
    rng, size = np.random.default_rng(0), (57, 83)
    path = pytest.importorskip("matplotlib.path")
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    points = 50 + rng.uniform(20, 45, 12)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = path.Path(points).contains_points(np.column_stack([100 * x.ravel() / 83, 100 * y.ravel() / 57]))
    assert (fill(points.tolist(), *size) != inside.reshape(size)).sum() <= 3  # on the edge
    for points in [], [(1, 2), (3, 4)], "abc", [(1, None)] * 3, None:
        with pytest.raises(Unreadable):
            fill(points, 4, 4)


def brush(mask):
    """A brush region as the browser submits it."""
    value = {"format": "rle", "rle": encode(mask), "brushlabels": ["Lesion"]}
    return {**region(mask.shape), "type": "brushlabels", "from_name": "brush", "value": value}


def polygon(points, size=SIZE):
    value = {"points": points, "closed": True, "polygonlabels": ["Lesion"]}
    return {**region(size), "type": "polygonlabels", "from_name": "polygon", "value": value}


def region(size):
    place = {"original_height": size[0], "original_width": size[1], "image_rotation": 0}
    return {"id": "abc", "to_name": "image", "origin": "manual", **place}


def text(words):
    return {**region(SIZE), "type": "textarea", "from_name": "reason", "value": {"text": words}}


def test_several_regions_are_joined_and_holes_stay():
    ring = some_masks()["a hole"]
    triangle = polygon([(0, 0), (20, 0), (0, 20)], ring.shape)
    joined = join([text(["seen"]), brush(ring), triangle], "Lesion", *ring.shape)
    assert joined[1, 1]
    assert not joined[30, 25]
    np.testing.assert_array_equal(joined[12:], ring[12:])


SPOILED = {
    "another label": lambda made: made["value"].update(brushlabels=["Hair"]),
    "no label": lambda made: made["value"].pop("brushlabels"),
    "another kind": lambda made: made.update(value={"x": 1, "rectanglelabels": ["Lesion"]}),
    "another size": lambda made: made.update(original_width=99),
    "turned": lambda made: made.update(image_rotation=90),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_region_that_is_no_lesion_is_refused(how):
    made = brush(np.ones(SIZE, bool))
    SPOILED[how](made)
    with pytest.raises(Unreadable):
        join([made], "Lesion", *SIZE)


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.fixture
def studio(monkeypatch):
    monkeypatch.setenv(TOKEN, LEGACY)
    monkeypatch.setattr(LabelStudioOracle, "POLL", 0.02)
    studio = FakeLabelStudio()
    yield studio
    studio.stop()


@pytest.fixture
def ask(studio, tmp_path):
    """A function that starts an oracle and asks for 8 photographs in iteration 1, as each start of a run does."""
    names = [f"naevus {n}.{['png', 'jpg', 'tif', 'bmp'][n % 4]}" for n in range(8)]
    photos = tmp_path / "photos"
    photos.mkdir()
    for n, (name, image) in enumerate(zip(names, blobs(8, *SIZE, seed=2)[0])):
        exif, picture = Image.Exif(), Image.fromarray(image[..., 0].clip(0, 255).astype(np.uint8)).convert("RGB")
        if n == 5:
            exif[0x0112] = 6
        picture.save(photos / name, **({"exif": exif} if n == 5 else {}))
    sizes = [SIZE[::-1] if n == 5 else SIZE for n in range(8)]
    blank = np.zeros((*SMALL, 1), np.uint8)
    records = []
    for n, name in enumerate(names):
        records.append(data.Row(f"id {n}", "train", sizes[n], blank, None, str(photos / name)))
    run = tmp_path / "run"
    data.write_dataset(tmp_path / "d.h5", records, 8, *SMALL, 1, "photos", folder=str(photos))
    (run / ".queries_01").mkdir(parents=True)
    scores = [3, 1, 4, 1.5, 9, 2.6, 5, 3.5]
    write_csv(
        run / ".queries_01" / "scores.csv",
        ["id", "uncertainty", "dice"],
        [(f"id {n}", s, "") for n, s in enumerate(scores)],
    )
    maps = np.zeros((8, 2, *SMALL), np.float32)
    maps[:, 0, 6:18, 8:24] = 0.9
    maps[3] = 0  # nothing found

    with data.Dataset(tmp_path / "d.h5") as dataset:

        def make(iteration=1, images=range(8), **switches):
            oracle = make.oracle = LabelStudioOracle(run, dataset, 3, studio.url, **switches)
            if iteration:
                oracle.ask(0, {})
                oracle.ask(iteration, {"random": list(images)}, lambda at: [tuple(maps[n]) for n in at])
            return oracle

        make.run, make.photos, make.sizes, make.dataset, make.scores = run, photos, sizes, dataset, scores
        yield make


def lesion(n, size=SIZE):
    """A different mask for each number, bool (h, w)."""
    mask = np.zeros(size, bool)
    mask[5 : 20 + n, 10:30] = True
    return mask


def test_images_are_handed_out_with_proposals_most_uncertain_first(ask, studio, capsys):
    with pytest.raises(Unanswered) as waiting:
        ask()
    assert not waiting.value.invalid
    (project,) = studio.projects.values()
    (view,) = studio.views.values()
    address = f"{studio.url}/projects/{project['id']}/data?tab={view['id']}&labeling=1"
    out, err = capsys.readouterr()
    assert (out, err) == (f"{address}: draw masks of 8 images in Label Studio\n", "")
    assert view["data"]["ordering"] == ["tasks:predictions_score"]
    order = [f"id {n}" for n in np.argsort(ask.scores)[::-1]]
    assert studio.stream(project["id"]) == order
    for n in range(8):
        task = studio.task(f"id {n}")
        content = studio.stored[task["data"]["image"]]
        assert task["data"]["group"] == "random"
        assert task["data"]["uncertainty"] == ask.scores[n]
        assert f"uncertainty {ask.scores[n]}" in task["data"]["caption"]
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size[::-1] == ask.sizes[n]
            assert picture.format == ("JPEG" if n == 1 else "PNG")  # 5 is a turned JPEG
        if n % 4 < 2 and n != 5:
            assert content == next(ask.photos.glob(f"naevus {n}.*")).read_bytes()
        (prediction,) = task["predictions"]
        height, width = ask.sizes[n]
        mask = join(prediction["result"], "Lesion", height, width)
        rectangle = np.zeros(SMALL, np.float32)
        rectangle[6:18, 8:24] = n != 3
        expected = np.asarray(Image.fromarray(rectangle).resize((width, height), Image.Resampling.BILINEAR)) * 0.9 > 0.5
        np.testing.assert_array_equal(mask, expected)

    # A second start uploads nothing, and names what is missing.
    writes = [entry for entry in studio.log if entry[0] != "GET"]
    with pytest.raises(Unanswered):
        ask()
    assert [entry for entry in studio.log if entry[0] != "GET"] == writes
    assert capsys.readouterr().out.count("missing: ") == 8
    assert json.loads((ask.run / "labelstudio.json").read_text())["tasks"]["3"] == studio.task("id 3")["id"]


def test_answers_of_all_kinds_are_collected_and_drafts_are_not(ask, studio, capsys):
    with pytest.raises(Unanswered):
        ask()
    studio.annotate("id 0", [brush(lesion(0))])
    studio.annotate("id 1", [polygon([(10, 10), (60, 10), (60, 70), (10, 70)])])
    studio.annotate("id 2", [brush(lesion(2)), text(["a mole"]), polygon([(90, 90), (99, 90), (99, 99)])])
    studio.annotate("id 3", [text(["blurred", " hairs "])], skipped=True)
    studio.annotate("id 4", [], skipped=True)
    studio.task("id 5")["drafts"] = [{"result": [brush(lesion(5, ask.sizes[5]))]}]
    studio.annotate("id 6", [])  # nothing drawn: refused
    studio.annotate("id 7", [{**brush(lesion(7)), "original_width": 7}])
    capsys.readouterr()
    with pytest.raises(Unanswered) as waiting:
        ask()
    assert waiting.value.invalid
    out, err = capsys.readouterr()
    assert "5 answers accepted" in out
    assert out.count("missing: ") == 3
    assert err.count("\n") == 2
    assert re.search(r"data\?task=\d+ \(id 6\): the mask is empty", err)
    assert re.search(r"data\?task=\d+ \(id 7\): a region was drawn on an image of 64x7", err)
    found = {row[0]: row for row in rows(ask.run)}
    assert {id: row[2] for id, row in found.items() if row[2]} == {"id 3": "blurred; hairs", "id 4": "no reason given"}
    np.testing.assert_array_equal(found["id 0"][3], lesion(0))
    both = lesion(2) | fill([(90, 90), (99, 90), (99, 99)], *SIZE)
    np.testing.assert_array_equal(found["id 2"][3], both)
    # With --partial the run goes on, and the rest counts later.
    oracle = ask(partial=True)
    answers = oracle.answers(1, np.arange(8))
    assert answers.positions.tolist() == [0, 1, 2]
    assert answers.rejected.tolist() == [3, 4]
    np.testing.assert_array_equal(answers.masks[2], shrink_mask(Image.fromarray(np.uint8(255) * both), *SMALL))
    raw = [json.loads(path.read_text()) for path in (ask.run / "labelstudio").glob("*.json")]
    assert sorted(made["id"] for made in raw) == [f"id {n}" for n in (0, 1, 2, 3, 4, 6, 7)]


def test_an_image_that_is_asked_for_again_keeps_its_task(ask, studio):
    with pytest.raises(Unanswered):
        ask()
    before = {number: task["data"] for number, task in studio.tasks.items()}
    studio.annotate("id 0", [brush(lesion(0))])
    ask(partial=True)
    with pytest.raises(Unanswered):
        ask(iteration=2, images=[1, 2])
    assert studio.tasks.keys() == before.keys()
    task = studio.task("id 1")
    assert task["data"]["iteration"] == 2
    assert task["data"]["image"] == before[task["id"]]["image"]
    assert len(task["predictions"]) == 1


def test_a_changed_annotation_follows_the_rule_for_corrections(ask, studio, capsys):
    with pytest.raises(Unanswered):
        ask(images=[0, 1])
    made = studio.annotate("id 0", [brush(lesion(0))])
    oracle = ask(iteration=None)
    assert oracle.collect() == []
    made |= {"result": [brush(lesion(1))], "updated_at": studio.now()}
    assert oracle.collect() == []
    assert "replaces the earlier mask" in capsys.readouterr().out
    studio.annotate("id 1", [brush(lesion(3))])
    ask(images=[0, 1])  # now they are in use
    before = rows(ask.run)
    made |= {"updated_at": studio.now()}  # saved again without a change
    assert ask(iteration=None).collect() == []
    made |= {"result": [brush(lesion(2))], "updated_at": studio.now()}
    (line,) = ask(iteration=None).collect()
    assert "id 0 is answered already" in line
    assert line.endswith("counts from iteration 2 on")
    assert rows(ask.run) == before
    assert ask(iteration=None, correct=True).collect() == []
    assert rows(ask.run)[: len(before)] == before
    assert rows(ask.run)[-1][:2] == ("id 0", 2)
    np.testing.assert_array_equal(rows(ask.run)[-1][3], lesion(2))
    studio.task("id 1")["annotations"].clear()  # what was accepted stays
    assert ask(iteration=None).collect() == []


def test_of_two_annotators_the_latest_counts_and_their_agreement_is_kept(ask, studio, capsys):
    with pytest.raises(Unanswered):
        ask(images=[0, 1, 2])
    first = studio.annotate("id 0", [brush(lesion(0))], by=1)
    studio.annotate("id 0", [brush(lesion(5))], by={"id": 7, "email": "x@example.org"})
    studio.annotate("id 1", [brush(lesion(0))], by=7)
    studio.annotate("id 1", [], by=1, skipped=True)
    studio.annotate("id 2", [brush(lesion(0))])
    oracle = ask(images=[0, 1, 2])
    a, b = lesion(0), lesion(5)
    dice = 2 * (a & b).sum() / (a.sum() + b.sum())
    (row,) = read_csv(ask.run / "agreement.csv")
    assert row == {"id": "id 0", "annotator": "1", "other": "7", "dice": f"{dice:.6f}"}
    assert f"Dice {dice:.3f} between two annotators, mean of 1 pairs" in capsys.readouterr().out
    assert oracle.answers(1, np.arange(3)).rejected.tolist() == [1]
    np.testing.assert_array_equal({r[0]: r[3] for r in rows(ask.run)}["id 0"], b)
    assert len(list((ask.run / "labelstudio").iterdir())) == 5
    # The first annotator changes the mask after it was used: a correction like any other.
    first |= {"result": [brush(lesion(9))], "updated_at": studio.now()}
    assert len(ask(iteration=None).collect()) == 1
    assert ask(iteration=None, correct=True).collect() == []
    np.testing.assert_array_equal(rows(ask.run)[-1][3], lesion(9))


def test_many_tasks_come_in_pages(ask, studio):
    with pytest.raises(Unanswered):
        ask()
    project = next(iter(studio.projects))
    for n in range(300 - 8):  # tasks of somebody else, to the end of the third page exactly
        studio.make_tasks(project, [{"data": {"image": str(n)}, "predictions": []}])
    last = studio.tasks.pop(studio.task("id 6")["id"])
    studio.tasks[last["id"]] = last
    studio.annotate("id 6", [brush(lesion(6))])
    ask(iteration=None).collect()
    assert [row[0] for row in rows(ask.run)] == ["id 6"]


def test_a_server_that_allows_small_pages_only_loses_no_task(ask, studio):
    studio.largest_page = 3
    for _ in range(2):
        with pytest.raises(Unanswered):
            ask()
        assert len(studio.tasks) == 8
    studio.annotate("id 7", [brush(lesion(7))])
    ask(iteration=None).collect()
    assert len(rows(ask.run)) == 1


def test_wait_collects_as_soon_as_every_image_is_answered_and_outlasts_the_server(ask, studio, capfd):
    def person():
        while len(studio.tasks) < 3:
            time.sleep(0.01)
        studio.annotate("id 0", [brush(lesion(0))])
        time.sleep(0.2)
        studio.stop()
        time.sleep(0.2)
        studio.restart()
        studio.annotate("id 1", [brush(lesion(1))])
        studio.annotate("id 2", [], skipped=True)

    thread = threading.Thread(target=person)
    thread.start()
    ask(images=[0, 1, 2], wait=True)
    thread.join()
    out, err = capfd.readouterr()
    assert re.search(r"[01] of 3 images are answered; watching http", out)
    assert err.count("warning: ") == err.count("no Label Studio answers there") == 1
    assert len(rows(ask.run)) == 3


# --------------------------------------------------------------------------------------------- tokens and what fails


def test_a_personal_token_is_exchanged_and_renewed_and_nothing_keeps_it(ask, studio, monkeypatch, capsys):
    monkeypatch.setenv(TOKEN, PERSONAL)
    studio.token, studio.seconds = PERSONAL, 0.05
    with pytest.raises(Unanswered):
        ask()
    accesses = len(studio.access)
    time.sleep(0.1)
    studio.annotate("id 0", [brush(lesion(0))])
    ask.oracle.collect()
    assert len(studio.access) > accesses
    assert len(rows(ask.run)) == 1
    secrets = [PERSONAL.encode(), *(access.encode() for access in studio.access)]
    written = [path.read_bytes() for path in ask.run.rglob("*") if path.is_file()]
    written.append("".join(capsys.readouterr()).encode())
    assert not any(secret in content for secret in secrets for content in written)


@pytest.mark.parametrize("token", ["", " ", "two words", "line\nbreak", "ümlaut"])
def test_a_token_that_cannot_be_one_is_refused_at_once(ask, monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match=TOKEN) as refused:
        ask()
    assert not token.strip() or token not in str(refused.value)


@pytest.mark.parametrize("token", ["f" * 40, "wrong.personal.token"])
def test_a_wrong_token_is_one_sentence_without_it(ask, monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match="refuses the token in LABEL_STUDIO_API_KEY") as refused:
        ask()
    assert token not in str(refused.value)
    assert "401" in str(refused.value)


def test_a_netrc_file_does_not_replace_the_token(ask, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(Unanswered):
        ask()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (500, "its disk may be full"),
        (507, "its disk may be full"),
        (503, "is not ready"),
        (400, "did not accept a request"),
        (403, "refuses the token"),
        (404, "is it the server of this run"),
        (302, "sends on to another address"),
        (204, "not Label Studio"),
    ],
)
def test_a_failing_server_is_one_sentence(ask, studio, status, words):
    studio.fail = status
    with pytest.raises(UserError, match=words) as refused:
        ask()
    assert "\n" not in str(refused.value)


def test_a_server_that_is_down_is_one_sentence_and_loses_nothing(ask, studio):
    with pytest.raises(Unanswered):
        ask()
    studio.annotate("id 0", [brush(lesion(0))])
    studio.stop()
    with pytest.raises(UserError, match="no Label Studio answers there"):
        ask()
    studio.restart()
    with pytest.raises(Unanswered):
        ask()
    assert [row[0] for row in rows(ask.run)] == ["id 0"]
    assert len(studio.tasks) == 8


def test_a_deleted_task_is_made_again_and_a_deleted_project_is_named(ask, studio, capsys):
    with pytest.raises(Unanswered):
        ask()
    studio.annotate("id 0", [brush(lesion(0))])
    with pytest.raises(Unanswered):
        ask()
    for id in "id 0", "id 1":
        del studio.tasks[studio.task(id)["id"]]
    capsys.readouterr()
    with pytest.raises(Unanswered):
        ask()
    assert capsys.readouterr().err.count("of id 1 was deleted in Label Studio; it is made again") == 1
    assert len(studio.tasks) == 7
    assert sum(map(len, studio.files.values())) == 8
    project = studio.projects.pop(json.loads((ask.run / "labelstudio.json").read_text())["project"])
    for what in ask, lambda: ask(iteration=None).collect():
        with pytest.raises(UserError, match="the project of this run is not there, or was deleted"):
            what()
    studio.projects[project["id"]] = {**project, "description": "of another run"}
    for what in ask, lambda: ask(iteration=None).collect():  # the second takes no answer from another run's project
        with pytest.raises(UserError, match="is not the project of this run"):
            what()
    (ask.run / "labelstudio.json").unlink()
    with pytest.raises(Unanswered):
        ask()  # in a new project
    assert len(studio.tasks) == 14
    assert len(studio.projects) == 2
    assert [row[0] for row in rows(ask.run)] == ["id 0"]


def test_a_run_that_needs_no_more_answers_needs_no_server(ask, studio, monkeypatch, capsys):
    with pytest.raises(Unanswered):
        ask(iteration=3, images=[0])
    studio.annotate("id 0", [brush(lesion(0))])
    ask(iteration=3, images=[0])
    studio.stop()
    assert ask(iteration=3, images=[0]).collect() == []
    assert "no Label Studio answers there" in capsys.readouterr().err
    monkeypatch.delenv(TOKEN)
    assert ask(iteration=None).collect() == []
    studio.restart()


def test_a_damaged_file_of_the_project_is_named(ask):
    with pytest.raises(Unanswered):
        ask()
    for content in "?", "[1]", "":
        (ask.run / "labelstudio.json").write_text(content)
        with pytest.raises(UserError, match=r"labelstudio\.json: damaged"):
            ask()


@pytest.mark.parametrize(
    "options",
    [
        "--labelstudio http://localhost:1",
        "--oracle folder --labelstudio http://localhost:1",
        "--oracle labelstudio --labelstudio localhost:8080",
        "--oracle labelstudio --labelstudio ftp://host",
        "--oracle labelstudio --labelstudio http://",
        "--oracle labelstudio --labelstudio http://host:99999",
        "--oracle labelstudio --labelstudio http://host/?token=SECRET",
        "--oracle labelstudio --labelstudio http://me:SECRET@host",
        "--oracle labelstudio --query none",
    ],
)
def test_a_wrong_address_is_refused_before_anything_is_stored(options):
    with pytest.raises(UserError, match=r"--(labelstudio|oracle)") as refused:
        read_command_line(["--run", "nowhere", *options.split()])
    assert "SECRET" not in str(refused.value)


# -------------------------------------------------------------------------------------------------------------- crashes


def killed(work, hook):
    """Do `work()` in a child process with `hook` before and after each request and file operation; the child may kill
    itself there. Returns whether it did."""
    child = os.fork()
    if not child:
        try:
            import requests

            request = requests.Session.request

            def watched(*arguments, **named):
                hook()
                answer = request(*arguments, **named)
                hook()
                return answer

            requests.Session.request = watched
            import sys

            sys.addaudithook(lambda event, arguments: event in ("open", "os.rename", "os.mkdir") and hook())
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
        except Unanswered:
            os._exit(0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at(n):
    """A hook that kills its process at its n-th call."""
    count = itertools.count(1)
    return lambda: next(count) == n and os.kill(os.getpid(), signal.SIGKILL)


def test_wherever_the_run_is_killed_nothing_is_uploaded_twice_and_no_answer_is_lost(ask, studio):
    """Kills at every third point of handing out, and then of collecting, until a start ends by itself."""
    for at in itertools.count(2, 3):
        if not killed(ask, kill_at(at)):
            break
    assert at > 20
    assert len(studio.projects) == len(studio.views) == 1
    assert sorted(task["data"]["id"] for task in studio.tasks.values()) == [f"id {n}" for n in range(8)]
    assert sum(map(len, studio.files.values())) == 8
    accepted, before = {}, []
    for at in itertools.count(2, 3):
        n = (at // 3) % 8
        if not studio.task(f"id {n}")["annotations"]:
            studio.annotate(f"id {n}", [brush(lesion(n, ask.sizes[n]))])
        done = not killed(ask, kill_at(at))
        if (ask.run / "annotations.h5").exists():
            before, accepted = accepted, {row[0]: row for row in rows(ask.run)}
            assert {id: accepted[id] for id in before} == before
        if done and len(accepted) == 8:
            break
    for n in range(8):
        np.testing.assert_array_equal(accepted[f"id {n}"][3], lesion(n, ask.sizes[n]))


@pytest.mark.parametrize("wait", [False, True])
def test_a_write_that_was_done_but_not_acknowledged_is_not_done_twice(ask, studio, wait, capsys):
    for lost in range(1, 20):
        studio.lose = lost
        (ask.run / "labelstudio.json").unlink(missing_ok=True)
        for kind in studio.projects, studio.views, studio.tasks, studio.files:
            kind.clear()
        if wait:
            ask(iteration=None)  # an answer of the server, so that it is waited for
            ask.oracle.wait = True
            ask.oracle._met = True
            ask.oracle._hand_out(1, [(f"id {n}", "random", n) for n in range(8)], None)
        else:
            for _ in range(2):
                with pytest.raises((Unanswered, UserError)):
                    ask()
        assert len(studio.projects) == len(studio.views) == 1
        assert len({task["data"]["id"] for task in studio.tasks.values()}) == len(studio.tasks) == 8
        assert sum(map(len, studio.files.values())) == 8


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_whole_run(studio, tmp_path, monkeypatch, capsys):
    """The answers are the true masks; one image is skipped."""

    def go(*options):
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(tmp_path / "r"), *options])
        code = train.main()
        return code or 0, *capsys.readouterr()

    code, out, err = go(*OPTIONS.split(), "--oracle", "labelstudio", "--labelstudio", studio.url)
    assert (code, err) == (0, "")
    assert f"{studio.url}/projects/" in out
    with data.Dataset(tmp_path / "r" / "synthetic.h5") as dataset:
        for task in studio.tasks.values():
            if task["data"]["group"] == "no_detection":
                studio.annotate(task["data"]["id"], [text(["a scar"])], skipped=True)
            else:
                studio.annotate(task["data"]["id"], [brush(dataset.masks([task["data"]["position"]])[0] > 0)])
    code, out, err = go()
    assert (code, err) == (0, "")
    assert "done: " in out
    assert [row["annotations"] for row in read_csv(tmp_path / "r" / "history.csv")] == ["6", "8"]
    assert [row[2] for row in rows(tmp_path / "r") if row[2]] == ["a scar"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or LEGACY.encode() not in path.read_bytes()


def test_a_server_that_has_moved_gets_its_new_address_once(tmp_path):
    run, moved = tmp_path / "r", "http://studio.example.org:9000"
    write_json(run / "config.json", dataclasses.asdict(read_config(["--run", str(run), "--oracle", "labelstudio"])))
    change_settings(read_config(["--run", str(run), "--labelstudio", moved]), run)
    assert read_config(["--run", str(run)]).labelstudio == moved
    with pytest.raises(UserError, match="was started with labelstudio"):
        read_config(["--run", str(run), "--oracle", "folder"])
