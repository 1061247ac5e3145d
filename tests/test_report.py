"""report.py: the page of a run, as a browser and a person would read it."""

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import h5py
import numpy as np
import pytest
from conftest import write_blobs
from PIL import Image

import report
import train
from data import Dataset, Row, write_dataset
from quality import write_answers, write_quality
from report import Axes, Page, Room, make_page, read_scores, ticks
from run_folder import HISTORY
from utils import read_csv, write_csv

OPTIONS = """
    --filters 2 --initial 9 --pool 40 --test 0 --initial-epochs 1 --active-epochs 1 --batch-size 4 --passes 2
    --iterations 2 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 2 --pseudo-first 2 --pseudo-step 2
"""
VOID = {"meta", "img", "br", "path", "rect", "circle", "polyline"}  # without an end tag here
HOSTILE = '<script>alert("1")</script>&\' onerror=x'


class Reader(HTMLParser):
    """Checks that every tag is closed, and collects headings, texts, pictures and references."""

    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.tags, self.pictures, self.references, self.text = [], [], [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        assert not any(name.startswith("on") for name in attributes)
        self.references += [attributes[name] for name in ("src", "href", "data", "action") if name in attributes]
        if tag == "img":
            self.pictures.append((attributes["src"], attributes["alt"]))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(page):
    """What holds for every page. Returns its Reader."""
    reader = Reader(page)
    assert len(page.encode()) < 5_000_000
    assert "http" not in re.sub('data:image/jpeg;base64,[^"]*', "", page)
    assert all(reference.startswith("data:image/") for reference in reader.references)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert reader.headings[0] == 1
    assert reader.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(reader.headings, reader.headings[1:]))
    for uri, words in reader.pictures:
        assert words.strip()
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).load()
    return reader


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 50, 32, 32)


@pytest.fixture
def dataset(data_file):
    with Dataset(data_file) as dataset:
        yield dataset


@pytest.fixture(scope="module")
def a_run(data_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "--run", str(run), "--data", str(data_file), *OPTIONS.split()])
        train.main()
    return run


def made_up_run(run, ids, finished, asked, size=(32, 32), **settings):
    """A run's folder without a network: every answer is the proposal. Returns the folder."""
    rng = np.random.default_rng(0)
    run.mkdir()
    defaults = dict.fromkeys(
        ["query", "uncertainty", "distance", "loss", "learning_rate", "schedule", "precision", "dropout"], "x"
    )
    numbers = (
        "initial pool test validation no_detection most_uncertain random passes pseudo_start pseudo_first pseudo_step"
    )
    defaults |= dict.fromkeys(f"{numbers} filters batch_size seed".split(), 0)
    config = {**defaults, "data": "d.h5", "oracle": "simulated", "iterations": finished, **settings}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({"date": "2026-01-01", "tensorflow": "2", "git_commit": None}))
    history = []
    for k in range(finished + 1):
        folder = run / f"iteration_{k:02d}"
        folder.mkdir()
        history.append([k, 10 + k * asked, 0, *6 * ["0.5"], "1.0", "1.0"])
        if k:
            some = [str(id) for id in rng.permutation(ids)[:asked]]
            write_csv(folder / "queries.csv", ["id", "group"], [(id, "random") for id in some])
            write_csv(folder / "scores.csv", ["id", "uncertainty", "dice"], [(id, rng.random(), "") for id in ids])
            y, x = np.indices(size)
            centres = rng.uniform(0.3, 0.7, (asked, 2, 1, 1)) * np.reshape(size, (2, 1, 1))
            masks = np.hypot(y - centres[:, 0], x - centres[:, 1]) < size[0] / 5
            drawn = dict(zip(some, masks))
            groups = dict.fromkeys(some, "random")
            write_answers(groups, asked * ["drawn"], masks, masks * 0.2, drawn, folder)
    write_csv(run / "history.csv", HISTORY, history)
    write_quality(run, finished + 1)
    return run


def noise_file(path, ids, height, width, channels=1):
    """A data file of pictures that compress worse than photographs."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(ids), height // 16, width // 16, channels), np.uint8).repeat(16, 1).repeat(16, 2)
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = 1
    rows = (Row(id, "train", (height, width), image, mask) for id, image in zip(ids, images))
    write_dataset(path, rows, len(ids), height, width, channels, HOSTILE)
    return path


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_of_a_finished_run(a_run):
    page = (a_run / "report.html").read_text()
    reader = check(page)
    assert "Iteration 2 of 2 is finished, with 17 annotations. The run has ended." in reader.text
    assert f"python predict.py IMAGES --weights {a_run}/iteration_02/model.weights.h5 --out masks" in reader.text
    assert "This run has no test images" in reader.text
    asked = [row for row in read_csv(a_run / "iteration_02" / "queries.csv") if row["group"] != "pseudo"]
    scored = read_csv(a_run / "iteration_02" / "scores.csv")
    scores = {row["id"]: float(row["uncertainty"]) for row in scored}
    disputed = {row["id"] for row in scored if float(row["agreement"]) < 0.75}
    for row, answer in zip(asked, read_csv(a_run / "iteration_02" / "answers.csv")):
        assert answer["id"] == row["id"]
        words = ", specialists are likely to disagree" * (row["id"] in disputed)
        named = f"score {scores[row['id']]:.3g}{words}"
        assert row["id"] in reader.text
        assert named in reader.text
        assert f"Dice of proposal and answer {float(answer['dice']):.3f}" in reader.text
    # The last iteration has four pictures an image, the first one.
    assert len(reader.pictures) == 4 * 4 + 4
    quality = read_csv(a_run / "quality.csv")[2]
    assert f"(Dice {float(quality['stability']):.3f})" in reader.text


def test_images_on_which_specialists_may_disagree_are_marked(tmp_path):
    rows = [("a", 0.5, "", 0.74), ("b", 0.25, "", 0.75), ("c", 3, "", "")]
    write_csv(tmp_path / "scores.csv", ["id", "uncertainty", "dice", "agreement"], rows)
    assert read_scores(tmp_path) == {"a": "0.5, specialists are likely to disagree", "b": "0.25", "c": "3"}


def test_the_estimate_for_the_pool_is_in_the_table(a_run, dataset, monkeypatch):
    assert "estimate" not in check(make_page(a_run, dataset)).text
    rows = report.read_quality(a_run, 3)
    rows[-1] |= {"estimate": "0.812", "estimate_low": "0.7", "estimate_high": "0.9"}
    monkeypatch.setattr(report, "read_quality", lambda *_: rows)
    assert "0.812 (0.700 to 0.900)" in check(make_page(a_run, dataset)).text


def test_the_page_is_made_anew_from_the_folder_alone(a_run, dataset):
    assert make_page(a_run, dataset, done=True) == (a_run / "report.html").read_text()


def test_another_process_makes_the_same_page(a_run, dataset, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(a_run, run)
    (run / "report.html").unlink()
    page = Page(run, dataset, beside=True)
    page.update()
    assert not (run / "report.html").exists()
    page.update(done=True)
    page.finish()
    assert (run / "report.html").read_text() == make_page(run, dataset, done=True)


def test_a_process_that_fails_is_replaced(a_run, dataset, tmp_path, monkeypatch):
    run = tmp_path / "r"
    shutil.copytree(a_run, run)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "gone.py"))
    page = Page(run, dataset, beside=True)
    page.update()
    page.finish()
    assert "goes on by itself" in (run / "report.html").read_text()


def test_a_page_before_the_first_training_has_ended(dataset, tmp_path):
    run = made_up_run(tmp_path / "r", dataset.ids, 0, 1)
    (run / "history.csv").unlink()
    assert "The first training has not ended yet." in check(make_page(run, dataset)).text


@pytest.mark.parametrize(
    ("iterations", "asked", "size"),
    [
        (9, 35, (192, 240)),
        pytest.param(60, 35, (64, 80), marks=pytest.mark.slow),
        pytest.param(1, 900, (64, 80), marks=pytest.mark.slow),
    ],
)
def test_the_page_stays_small(tmp_path, iterations, asked, size):
    ids = [f"image_{n}" for n in range(1000)]
    run = made_up_run(tmp_path / "r", ids, iterations, asked, size)
    with Dataset(noise_file(tmp_path / "d.h5", ids, *size, channels=3)) as dataset:
        reader = check(make_page(run, dataset))
    left_out = sum(int(count) for count in re.findall(r"(\d+) images of this iteration are not shown", reader.text))
    assert left_out == 0 or iterations * asked > 315
    assert iterations * asked - left_out > 200


def test_hostile_names_are_escaped(tmp_path):
    ids = [HOSTILE, "b\nc\x07", "d" * 300]
    run = made_up_run(tmp_path / f"r {HOSTILE.replace('/', '')}", ids, 2, 3, data=HOSTILE)
    with Dataset(noise_file(tmp_path / "d.h5", ids, 32, 32)) as dataset:
        reader = check(make_page(run, dataset))
    assert HOSTILE in reader.text
    assert "b\\nc\\x07" in reader.text


def test_an_iteration_of_an_earlier_version_shows_its_images(a_run, dataset, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(a_run, run)
    for path in (*run.rglob("answers.*"), *run.rglob("quality.csv")):
        path.unlink()
    (run / "iteration_01" / "answers.npz").write_bytes(b"no zip file")
    reader = check(make_page(run, dataset))
    assert "An earlier version made this iteration" in reader.text
    assert len(reader.pictures) == 4 + 4


def test_rejections_corrections_and_missing_answers_are_named(dataset, tmp_path):
    run = made_up_run(tmp_path / "r", dataset.ids, 2, 4, oracle="folder")
    folder = run / "iteration_02"
    ids = [row["id"] for row in read_csv(folder / "queries.csv")]
    masks, groups = np.ones((4, 32, 32), bool), dict.fromkeys(ids, "random")
    states = ["rejected", "missing", "drawn", "drawn"]
    write_answers(groups, states, masks, masks * 0.1, dict(zip(ids[2:], masks)), folder)
    with h5py.File(run / "annotations.h5", "w") as file:
        file["ids"], file["iterations"] = [ids[0], "B_0000001", "B_0000001"], [2, 1, 2]
        file["rejections"] = ["<b>not a lesion</b>", "", ""]
    reader = check(make_page(run, dataset))
    assert "rejected (<b>not a lesion</b>)" in reader.text
    assert "not answered" in reader.text
    assert "Rejected images: 1; corrections of earlier answers: 1." in reader.text
    assert len(reader.pictures) == 3 + 3 + 4 + 4 + 4


def test_while_answers_are_awaited_the_page_says_what_to_do(dataset, tmp_path):
    run = made_up_run(tmp_path / "r", dataset.ids, 1, 4, oracle="folder", iterations=3)
    shutil.copytree(run / "iteration_01", run / ".queries_02")
    ids = [row["id"] for row in read_csv(run / ".queries_02" / "queries.csv")]
    overlay = run / "annotate" / "iteration_02" / "overlay"
    overlay.mkdir(parents=True)
    Image.new("RGB", (600, 400), (200, 0, 0)).save(overlay / f"{ids[0]}.png")
    whole = (overlay / f"{ids[0]}.png").read_bytes()
    (overlay / f"{ids[2]}.png").write_bytes(whole[:60] + bytes(len(whole) - 60))  # as after a power cut
    with h5py.File(run / "annotations.h5", "w") as file:
        file["ids"], file["iterations"], file["rejections"] = [ids[1]], [2], [""]
    reader = check(make_page(run, dataset))
    assert "The run waits for answers: 1 of 4 are there." in reader.text
    assert f"Draw the missing masks in {run}/annotate/iteration_02" in reader.text
    assert f"python train.py --run {run}" in reader.text
    assert [words for _, words in reader.pictures[:3]] == [f"{ids[0]}, with the outline of the proposal", *ids[1:3]]
    assert reader.text.count("no answer yet") == 3


def test_a_run_has_its_page_whatever_its_folder_is_called(dataset, tmp_path):
    run = made_up_run(tmp_path / os.fsdecode("Müller".encode("latin-1")), dataset.ids, 1, 4)
    Page(run, dataset).update(done=True)
    assert "ller/iteration_01" in (run / "report.html").read_text()


# -------------------------------------------------------------------------------------------------------- its parts


def test_ticks_are_round_numbers():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(100, 415) == [100, 200, 300, 400]
    assert ticks(0.81, 0.83) == [0.81, 0.815, 0.82, 0.825, 0.83]


def test_axes_keep_to_the_chart():
    axes = Axes((5, 5), (0, 1))
    assert axes.x(5) == report.LEFT
    assert axes.y(0) == report.HEIGHT - report.BELOW
    assert axes.y(1) == 10


def test_an_outline_shows_where_the_mask_ends():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    uri = Room(10**6).picture(np.full((40, 60, 1), 128, np.uint8), 60, (mask, (0, 255, 255), False))
    values = np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)
    assert np.abs(values[20, 30] - 128).max() < 25  # inside
    assert np.abs(values[5, 5] - 128).max() < 25  # outside
    assert values[20, 20, 2] > values[20, 20, 0] + 60  # cyan
    assert Room(0).picture(np.zeros((4, 4, 1), np.uint8), 4) is None
