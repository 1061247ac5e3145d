"""The folder oracle: a person, here a script, is asked in runs/NAME/annotate, and no answer is ever lost."""

import csv
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from hashlib import blake2b
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, blobs
from PIL import Image
from scipy.ndimage import binary_dilation
from test_faults import content, start

import data
import train
from data import Dataset
from oracle import FolderOracle, Unanswered, draw_overlay, read_rejections
from pictures import shrink_mask
from run_folder import METRICS
from trainer import Trainer
from utils import UserError, read_csv, write_csv

KILLS = int(os.environ.get("KILLS", 2))
SIZE = 32, 48
OPTIONS = """
    --filters 2 --initial 6 --pool 20 --test 4 --initial-epochs 3 --active-epochs 1 --batch-size 4 --passes 2
    --iterations 2 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 1 --pseudo-first 2 --pseudo-step 0
    --learning-rate 0.001
"""
TURNED = 6  # the EXIF orientation of a camera held upright


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """34 photographs of 64x96, some on their side, and the truths as displayed: (folder, dict of id to mask)."""
    folder, truths = tmp_path_factory.mktemp("hospital") / "photos of skin", {}
    folder.mkdir()
    images, masks = blobs(34, 64, 96, seed=5)
    images = images[..., 0].clip(0, 255).astype(np.uint8)
    for n, (image, mask) in enumerate(zip(images, masks[..., 0] > 0)):
        id, exif = (f"naevus {n:02d}" if n % 3 else f"-é{n:02d}"), Image.Exif()
        picture, truths[id] = Image.fromarray(image).convert("RGB"), mask
        if n % 4 == 0:
            exif[0x0112], truths[id] = TURNED, np.rot90(mask, -1)
        picture.save(folder / (f"{id}.JPG" if n % 2 else f"{id}.png"), exif=exif)
    return folder, truths


def save_mask(mask, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(255 * np.asarray(mask).astype(np.uint8)).save(path)


def make_file(hospital, path, drawn):
    """A data file of the hospital's images, with the masks of the ids `drawn`."""
    photos, truths = hospital
    masks = path.with_name(f"{path.stem}_masks")
    masks.mkdir()
    for id in drawn:
        save_mask(truths[id], masks / f"{id}.png")
    arguments = ["folder", photos, path, "--masks", masks, "--height", SIZE[0], "--width", SIZE[1]]
    subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def few_masks(hospital, tmp_path_factory):
    """A data file with masks for 4 images, which are for test."""
    return make_file(hospital, tmp_path_factory.mktemp("data") / "few.h5", sorted(hospital[1])[::9])


@pytest.fixture(scope="module")
def all_masks(hospital, tmp_path_factory):
    return make_file(hospital, tmp_path_factory.mktemp("data") / "all.h5", hospital[1])


@pytest.fixture
def go(monkeypatch, capsys):
    """Start `train.py --run RUN ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def go(run, *arguments):
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(run), *map(str, arguments)])
        code = train.main()
        return code or 0, *capsys.readouterr()

    return go


def read_table(folder):
    """The rows of queries.csv, which a spreadsheet program may have saved."""
    with open(folder / "queries.csv", newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def asked(run, iteration):
    """The ids that a person is asked for."""
    return [row["id"] for row in read_table(run / "annotate" / f"iteration_{iteration:02d}")]


def reject(folder, id, answer, delimiter=","):
    """Write into queries.csv as a spreadsheet program does."""
    rows = read_table(folder)
    with open(folder / "queries.csv", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([list(rows[0]), *((r["id"], r["group"], answer if r["id"] == id else "") for r in rows)])


def kept(run):
    """What annotations.h5 holds, read without the program: id to (iteration, hash, rejection, mask or None)."""
    with h5py.File(run / "annotations.h5") as file:
        columns = (
            file["ids"].asstr()[:],
            file["iterations"][:],
            file["hashes"].asstr()[:],
            file["rejections"].asstr()[:],
        )
        found = {id: (*answer, file["masks"][id][:] if id in file["masks"] else None) for id, *answer in zip(*columns)}
        assert len(found) == len(file["ids"])
    return found


def everything(run):
    """All that a run has found and kept, to be compared, without the seconds."""
    found = {name: what for name, what in content(run).items() if not name.startswith("annotations.h5/")}
    answers = {id: (*answer, None if mask is None else mask.tolist()) for id, (*answer, mask) in kept(run).items()}
    return {**found, "annotations.h5": answers}


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_whole_run_with_a_person_who_starts_with_no_masks(go, hospital, few_masks, tmp_path, monkeypatch):
    photos, truths = hospital
    run, trained, fit = tmp_path / "a run", [], Trainer.fit

    def spy(self, positions, labels, iteration):
        trained.append(dict(zip(self.dataset.ids[positions], labels)))
        fit(self, positions, labels, iteration)

    monkeypatch.setattr(Trainer, "fit", spy)

    # It asks for the first masks, and has nothing to propose.
    code, out, err = go(run, "--data", few_masks, "--oracle", "folder", *OPTIONS.split())
    assert (code, err) == (0, "")
    folder = run / "annotate" / "iteration_00"
    assert f"{folder}: masks of 6 images are asked for" in out
    assert out.splitlines()[-1].endswith(f"go on with: python train.py --run {shlex.quote(str(run))}")
    assert sorted(p.name for p in folder.iterdir()) == ["README.txt", "images", "masks", "queries.csv"]
    assert "no proposed/" in (folder / "README.txt").read_text()
    assert f"python train.py --run '{run}'" in (folder / "README.txt").read_text()
    first = asked(run, 0)
    assert {row["group"] for row in read_csv(folder / "queries.csv")} == {"initial"}
    assert len(first) == 6
    assert trained == []

    # Some masks are wrong, some missing: all of that is named, and the right ones are kept.
    for id in first[:3]:
        save_mask(truths[id], folder / "masks" / f"{id}.png")
    Image.fromarray(np.indices(truths[first[3]].shape).sum(0).astype(np.uint8)).save(
        folder / "masks" / f"{first[3]}.png"
    )
    save_mask(truths[first[4]][:-1], folder / "masks" / f"{first[4]}.png")
    save_mask(truths[first[0]], folder / "masks" / "somebody.png")
    code, out, err = go(run)
    assert code == 2
    assert len(err.splitlines()) == 3
    for name in (first[3], first[4], "somebody"):
        assert f"{name}.png: " in err
    assert [line for line in out.splitlines() if line.startswith("missing")] == [
        f"missing: {folder / 'masks' / id}.png" for id in first[3:]
    ]
    assert sorted(kept(run)) == sorted(first[:3])
    (folder / "masks" / "somebody.png").unlink()
    for id in first[3:5]:
        (folder / "masks" / f"{id}.png").unlink()
    code, out, err = go(run)
    assert (code, err, out.count("missing: ")) == (0, "", 3)

    # The rest comes, one of it a rejection, and one at the network's size.
    shrunk = shrink_mask(Image.fromarray(255 * truths[first[3]].astype(np.uint8)), *SIZE)
    save_mask(shrunk, folder / "masks" / f"{first[3]}.png")
    save_mask(truths[first[4]], folder / "masks" / f"{first[4]}.TIFF")
    reject(folder, first[5], "Reject: not a lesion, a tattoo", ";")
    code, out, err = go(run)
    assert (code, err) == (0, "")
    assert "iteration 0: 5 annotations" in out
    assert kept(run)[first[5]][:4] == (0, "", "not a lesion, a tattoo", None)
    np.testing.assert_array_equal(kept(run)[first[4]][3], truths[first[4]])
    handed_in = (folder / "masks" / f"{first[0]}.png").read_bytes()
    assert kept(run)[first[0]][1] == blake2b(handed_in, digest_size=16).hexdigest()
    assert trained[0].keys() == set(first[:5])
    for id in first[:5]:
        original = Image.fromarray(255 * truths[id].astype(np.uint8))
        np.testing.assert_array_equal(trained[0][id], shrunk if id == first[3] else shrink_mask(original, *SIZE))
    assert [row["group"] for row in read_csv(run / "iteration_00" / "queries.csv")] == ["initial"] * 6

    # Now the network proposes masks, which fit what an editor shows of the image.
    folder = run / "annotate" / "iteration_01"
    second = asked(run, 1)
    assert first[5] not in {row["id"] for row in read_csv(run / ".queries_01" / "scores.csv")}
    assert len(second) == 4
    assert not list((folder / "masks").iterdir())
    for id in second:
        (original,) = photos.glob(f"{id}.*")
        assert (folder / "images" / original.name).read_bytes() == original.read_bytes()
        with Image.open(folder / "proposed" / f"{id}.png") as proposed:
            assert (proposed.mode, proposed.size[::-1]) == ("L", truths[id].shape)
            assert set(np.unique(proposed)) <= {0, 255}
        with Image.open(folder / "overlay" / f"{id}.png") as overlay:
            assert overlay.size[::-1] == truths[id].shape

    # One is copied, one dilated, one drawn anew; one stays open, and the run goes on without it.
    masks = {id: np.asarray(Image.open(folder / "proposed" / f"{id}.png")) > 0 for id in second}
    masks = {id: mask if mask.any() else truths[id] for id, mask in masks.items()}
    masks[second[1]], masks[second[2]] = binary_dilation(masks[second[1]]), truths[second[2]]
    for id in second[:3]:
        save_mask(masks[id], folder / "masks" / f"{id}.png")
    code, out, err = go(run, "--partial")
    assert (code, err) == (0, "")
    assert "iteration 1: 8 annotations" in out
    for id in second[:3]:
        np.testing.assert_array_equal(kept(run)[id][3], masks[id])
    assert set(first[:5] + second[:3]) <= trained[1].keys()
    assert second[3] in {row["id"] for row in read_csv(run / ".queries_02" / "scores.csv")}  # back in the pool

    # The mask left open comes late; another one is changed, which changes nothing.
    save_mask(truths[second[3]], folder / "masks" / f"{second[3]}.png")
    save_mask(truths[second[0]] | binary_dilation(masks[second[0]]), folder / "masks" / f"{second[0]}.png")
    third = asked(run, 2)
    folder = run / "annotate" / "iteration_02"
    assert not set(third) & {*first, *second[:3]}
    for id in third:
        save_mask(truths[id], folder / "masks" / f"{id}.png")
    code, out, err = go(run)
    assert code == 0
    assert err.count("\n") == 1
    assert f"{second[0]}.png: {second[0]} was taken in already; the earlier mask is kept" in err
    np.testing.assert_array_equal(kept(run)[second[0]][3], masks[second[0]])
    assert kept(run)[second[3]][0] == 2
    history = read_csv(run / "history.csv")
    assert [int(row["annotations"]) for row in history] == [5, 8, 8 + len({*third, second[3]})]
    assert "done: " in out

    # A finished run does nothing.
    before = everything(run)
    code, out, err = go(run)
    assert "3 iterations are done already" in out
    assert everything(run) == before


def test_a_person_who_draws_the_truth_gives_the_simulated_run_bit_for_bit(go, hospital, all_masks, tmp_path):
    go(tmp_path / "simulated", "--data", all_masks, *OPTIONS.split())
    run = tmp_path / "folder"
    go(run, "--data", all_masks, "--oracle", "folder", *OPTIONS.split())
    assert "initial" not in (run / ".queries_01" / "queries.csv").read_text()
    for iteration in 1, 2:
        for id in asked(run, iteration):
            save_mask(hospital[1][id], run / "annotate" / f"iteration_{iteration:02d}" / "masks" / f"{id}.png")
        assert go(run)[0] == 0
    simulated, found = (content(tmp_path / name) for name in ("simulated", "folder"))
    mine = {name: what for name, what in found.items() if name.split("/")[0].startswith(("iteration", "history"))}
    expected = {
        name: what for name, what in simulated.items() if name.split("/")[0].startswith(("iteration", "history"))
    }
    assert mine == expected


def test_without_test_images_the_result_is_not_measured_and_the_run_says_so(go, few_masks, hospital, tmp_path):
    run = tmp_path / "r"
    out = go(run, "--data", few_masks, "--oracle", "folder", *OPTIONS.split(), "--test", 0, "--iterations", 1)[1]
    assert out.count("there are no test images") == 1
    for iteration in 0, 1:
        for id in asked(run, iteration):
            save_mask(hospital[1][id], run / "annotate" / f"iteration_{iteration:02d}" / "masks" / f"{id}.png")
        code, out, err = go(run)
        assert (code, err) == (0, "")
    history = read_csv(run / "history.csv")
    assert [row["annotations"] for row in history] == ["6", "10"]
    assert {row[name] for row in history for name in METRICS} == {""}
    assert not list(run.rglob("test.csv")) + list(run.rglob("dice.png"))
    assert (run / "iteration_01" / "scores.png").exists()
    scores = read_csv(run / "iteration_01" / "scores.csv")
    with Dataset(few_masks) as dataset:
        known = dict(zip(dataset.ids, dataset.has_mask))
    assert [row["dice"] != "" for row in scores] == [known[row["id"]] for row in scores]


def test_wait_goes_on_as_soon_as_all_is_answered(go, few_masks, hospital, tmp_path, monkeypatch):
    monkeypatch.setattr(FolderOracle, "POLL", 0.05)
    run, stop = tmp_path / "r", threading.Event()

    def person():
        done = set()
        while not stop.wait(0.2):
            for folder in sorted(run.glob("annotate/iteration_*")):
                for row in read_csv(folder / "queries.csv"):
                    if (folder, row["id"]) not in done:
                        done.add((folder, row["id"]))
                        save_mask(hospital[1][row["id"]], folder / "masks" / f"{row['id']}.png")
                        break

    thread = threading.Thread(target=person)
    thread.start()
    try:
        code, out, err = go(
            run, "--data", few_masks, "--oracle", "folder", "--wait", *OPTIONS.split(), "--iterations", 1
        )
    finally:
        stop.set()
        thread.join()
    assert (code, err) == (0, "")
    assert "watching " in out
    assert [row["annotations"] for row in read_csv(run / "history.csv")] == ["6", "10"]


def test_without_a_person_images_without_masks_are_refused(go, few_masks, tmp_path):
    with pytest.raises(UserError, match=r"few\.h5: .* has no mask \(26 such images .* --oracle folder"):
        go(tmp_path / "r", "--data", few_masks, *OPTIONS.split())
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------ what is handed in


@pytest.fixture
def oracle(few_masks, tmp_path):
    """A function that makes a FolderOracle anew, as a start of the run does; it has asked for 8 images."""
    run = tmp_path / "run"
    with Dataset(few_masks) as dataset:
        positions = np.flatnonzero(~dataset.has_mask)[:8]
        (run / ".queries_00").mkdir(parents=True)
        write_csv(run / ".queries_00" / "queries.csv", ["id", "group"], [(dataset.ids[n], "random") for n in positions])
        groups, shape = {"random": positions}, (8, *SIZE)
        maps = np.random.default_rng(0).random((2, *shape)).astype(np.float32)

        def make(ask=True, **switches):
            oracle = FolderOracle(run, dataset, **switches)
            if ask:
                oracle.ask(0, groups, lambda positions: zip(*maps))
            return oracle

        with pytest.raises(Unanswered):
            make()
        make.ids, make.positions, make.folder, make.dataset = (
            dataset.ids[positions],
            positions,
            run / "annotate",
            dataset,
        )
        make.masks = run / "annotate" / "iteration_00" / "masks"
        yield make


def as_rgba(mask):
    return Image.fromarray(np.dstack([np.full((*mask.shape, 3), 255, np.uint8), np.uint8(255) * mask]))


WAYS = {  # of saving a mask, bool (h, w), that are right
    "png": lambda mask, path: save_mask(mask, path),
    "bit": lambda mask, path: Image.fromarray(mask).save(path),
    "labels 0 and 1": lambda mask, path: Image.fromarray(mask.astype(np.uint8)).save(path),
    "rgb": lambda mask, path: Image.fromarray(np.uint8(255) * mask).convert("RGB").save(path),
    "white on nothing": lambda mask, path: as_rgba(mask).save(path),
    "palette": lambda mask, path: Image.fromarray(np.uint8(255) * mask).convert("P").save(path),
    "tif": lambda mask, path: save_mask(mask, path.with_suffix(".tif")),
    "bmp": lambda mask, path: save_mask(mask, path.with_suffix(".BMP")),
    "gif": lambda mask, path: save_mask(mask, path.with_suffix(".gif")),
    "16 bits": lambda mask, path: Image.fromarray(mask.astype(np.uint16)).save(path),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_is_taken_as_an_editor_saves_it(oracle, hospital, way):
    id = oracle.ids[3]
    WAYS[way](hospital[1][id], oracle.masks / f"{id}.png")
    assert oracle(ask=False).collect() == []
    np.testing.assert_array_equal(kept(oracle.folder.parent)[id][3], hospital[1][id])


WRONG = {  # ways of handing in an answer that are wrong, and what the sentence says beside the name
    "grey": (
        lambda mask, path: Image.fromarray(np.indices(mask.shape).sum(0).astype(np.uint8)).save(path),
        "not a mask",
    ),
    "empty": (lambda mask, path: save_mask(0 * mask, path), "empty"),
    "a speck": (lambda mask, path: save_mask(np.arange(mask.size).reshape(mask.shape) == 700, path), "speck"),
    "another size": (lambda mask, path: save_mask(mask[:-1], path), "rows x"),
    "turned": (lambda mask, path: save_mask(mask.T, path), "rows x"),
    "jpeg": (lambda mask, path: save_mask(mask, path.with_suffix(".jpg")), "JPEG"),
    "jpeg named png": (lambda mask, path: Image.fromarray(np.uint8(255) * mask).save(path, "JPEG"), "JPEG"),
    "no picture": (lambda mask, path: path.write_text("a mask"), "not a readable picture"),
    "truncated": (
        lambda mask, path: save_mask(mask, path) or path.write_bytes(path.read_bytes()[:-60]),
        "not a readable",
    ),
    "no bytes": (lambda mask, path: path.touch(), "not a readable picture"),
    "an editor's own format": (lambda mask, path: path.with_suffix(".xcf").write_text("gimp"), ".xcf: not a readable"),
    "a folder": (lambda mask, path: path.mkdir(), "no file"),
    "another name": (
        lambda mask, path: save_mask(mask, path.with_name(f"{path.stem}_mask.png")),
        "_mask.png: no image",
    ),
    "two": (lambda mask, path: [save_mask(mask, path.with_suffix(s)) for s in (".png", ".tif")], ".tif are both for"),
    "with a rejection": (
        lambda mask, path: save_mask(mask, path) or say(path, "reject"),
        "rejected in queries.csv as well",
    ),
    "no answer": (lambda mask, path: say(path, "maybe"), "'maybe' for"),
    "no such image": (lambda mask, path: say(path, "reject", "somebody"), "no such image"),
    "no table": (lambda mask, path: (path.parent.parent / "queries.csv").write_text("see my mail"), "first line"),
    "an empty table": (lambda mask, path: (path.parent.parent / "queries.csv").write_text(""), "first line"),
    "the table gone": (lambda mask, path: (path.parent.parent / "queries.csv").unlink(), "cannot be read"),
}


def say(path, answer, id=None):
    (path.parent.parent / "queries.csv").write_text(f"id,group,answer\n{id or path.stem},random,{answer}\n")


@pytest.mark.parametrize("way", WRONG)
def test_what_is_wrong_is_named_and_what_is_right_is_kept(oracle, hospital, way, capsys):
    right, wrong = oracle.ids[1], oracle.ids[4]  # on its side
    hand_in, words = WRONG[way]
    hand_in(hospital[1][wrong], oracle.masks / f"{wrong}.png")
    save_mask(hospital[1][right], oracle.masks / f"{right}.png")
    for clutter in "Thumbs.db", ".DS_Store", f"._{right}.png", "desktop.ini":
        (oracle.masks / clutter).write_text("clutter")
    capsys.readouterr()
    with pytest.raises(Unanswered) as waiting:
        oracle()
    assert waiting.value.wrong
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith(f"error: {oracle.folder / 'iteration_00'}")
    assert words in err
    assert out.count("missing: ") == 7
    assert kept(oracle.folder.parent).keys() == {right}


def test_an_answer_stays_as_it_is(oracle, hospital, capsys):
    run, (drawn, unread) = oracle.folder.parent, oracle.ids[:2]
    save_mask(hospital[1][drawn], oracle.masks / f"{drawn}.png")
    reject(oracle.masks.parent, unread, "reject: unreadable", "\t")
    assert oracle(ask=False).collect() == []
    before = kept(run)
    assert (before[unread][2], before[drawn][2]) == ("unreadable", "")
    stamp = (run / "annotations.h5").stat().st_mtime_ns
    assert oracle(ask=False).collect() == []
    assert (run / "annotations.h5").stat().st_mtime_ns == stamp  # nothing new, nothing written

    save_mask(~hospital[1][drawn], oracle.masks / f"{drawn}.png")
    say(oracle.masks / "x.png", "", unread)
    save_mask(hospital[1][unread], oracle.masks / f"{unread}.png")
    wrong = oracle(ask=False).collect()
    assert [line.split(": ")[-1] for line in wrong] == [
        f"{drawn} was taken in already; the earlier mask is kept",
        f"{unread} was taken in already; the earlier rejection is kept",
    ]
    shutil.rmtree(oracle.masks)
    assert oracle(ask=False).collect() == []
    say(oracle.masks / "x.png", "reject", drawn)
    assert "the earlier mask is kept" in oracle(ask=False).collect()[0]
    after = kept(run)
    assert after.keys() == before.keys()
    assert all(after[id][:3] == before[id][:3] for id in before)
    np.testing.assert_array_equal(after[drawn][3], hospital[1][drawn])


def test_partial_takes_what_there_is_and_late_answers_count_from_the_next_iteration(oracle, hospital):
    run = oracle.folder.parent
    with pytest.raises(Unanswered):
        oracle(partial=True)  # nothing at all is too little
    save_mask(hospital[1][oracle.ids[5]], oracle.masks / f"{oracle.ids[5]}.png")
    save_mask(hospital[1][oracle.ids[2]], oracle.masks / f"{oracle.ids[2]}.png")
    oracle(partial=True)
    positions, masks, rejected = oracle(ask=False).answers(0, oracle.positions)
    assert positions.tolist() == oracle.positions[[2, 5]].tolist()  # in the order in which they were asked for
    for position, mask in zip(positions, masks):
        picture = Image.fromarray(255 * hospital[1][oracle.dataset.ids[position]].astype(np.uint8))
        np.testing.assert_array_equal(mask, shrink_mask(picture, *SIZE))
    assert len(rejected) == 0

    save_mask(hospital[1][oracle.ids[0]], oracle.masks / f"{oracle.ids[0]}.png")
    reject(oracle.masks.parent, oracle.ids[7], "reject")
    late = oracle(ask=False)
    late.collect()
    assert len(late.answers(0, oracle.positions).positions) == 2  # what was trained with stays what it was
    answers = late.answers(1, [])
    assert (answers.positions.tolist(), answers.rejected.tolist()) == ([oracle.positions[0]], [oracle.positions[7]])
    assert kept(run)[oracle.ids[7]][:3] == (1, "", "no reason given")


def test_proposals_lie_on_the_image_as_it_is_displayed(oracle):
    """The maps of the fixture are noise, so that each pixel tells whether image and proposal are turned alike."""
    maps = np.random.default_rng(0).random((2, 8, *SIZE)).astype(np.float32)
    for n, (id, position) in enumerate(zip(oracle.ids, oracle.positions)):
        height, width = map(int, oracle.dataset.original_sizes[position])
        with Image.open(oracle.masks.parent / "proposed" / f"{id}.png") as picture:
            expected = np.asarray(Image.fromarray(maps[0, n]).resize((width, height), Image.Resampling.BILINEAR)) > 0.5
            np.testing.assert_array_equal(np.asarray(picture), 255 * expected)
        with Image.open(oracle.masks.parent / "overlay" / f"{id}.png") as picture:
            assert picture.size == (width, height)
            cyan = (np.asarray(picture) == (0, 255, 255)).all(-1)
            assert 0.2 < cyan.mean() < 0.9


def test_a_large_image_gets_a_small_overlay():
    overlay = draw_overlay(Image.new("RGB", (3000, 1500), "white"), np.zeros(SIZE, "f4"), np.eye(*SIZE, dtype="f4"))
    assert overlay.size == (1024, 512)
    assert (np.asarray(overlay)[10, 10] != 255).any()  # the uncertain diagonal is red
    assert (np.asarray(overlay)[10, -10] == 255).all()


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_text("?"), lambda path: save_mask(np.eye(9), path)]
)
def test_an_original_that_is_gone_or_another_is_named(few_masks, hospital, tmp_path, spoil):
    photos = shutil.copytree(hospital[0], tmp_path / "photos")
    with Dataset(few_masks) as dataset:
        dataset.folder = str(photos)
        spoil(photos / dataset.files[2])
        oracle = FolderOracle(tmp_path, dataset)
        with pytest.raises(UserError, match=dataset.files[2]):
            oracle.ask(0, {"initial": np.array([1, 2])})
    assert not list((tmp_path / "annotate").iterdir())


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes(path.read_bytes()[:900]), lambda path: path.write_text("")]
)
def test_damaged_annotations_are_refused_by_name(oracle, hospital, spoil):
    save_mask(hospital[1][oracle.ids[0]], oracle.masks / f"{oracle.ids[0]}.png")
    oracle(ask=False).collect()
    path = oracle.folder.parent / "annotations.h5"
    spoil(path)
    with pytest.raises(UserError, match=r"annotations\.h5: damaged"):
        oracle(ask=False)


def test_a_damaged_mask_of_the_annotations_is_refused_by_name(oracle, hospital):
    save_mask(hospital[1][oracle.ids[0]], oracle.masks / f"{oracle.ids[0]}.png")
    oracle(ask=False).collect()
    path = oracle.folder.parent / "annotations.h5"
    with h5py.File(path) as file:
        start = file["masks"][oracle.ids[0]].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(8))
    with pytest.raises(UserError, match=r"annotations\.h5: damaged"):
        oracle(ask=False).answers(0, np.array([], int))


# ------------------------------------------------------------------------------------------------------------- kills

# Takes in what was handed in, and dies at its n-th file operation in the run's folder, n given.
COLLECT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import data, oracle
run, at, count = sys.argv[2], int(sys.argv[4]), 0
def hook(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and run in str(arguments[0]):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
with data.Dataset(sys.argv[3]) as dataset:
    sys.addaudithook(hook)
    oracle.FolderOracle(Path(run), dataset).collect()
print(count)
"""


def test_whenever_the_taking_in_is_killed_nothing_that_was_accepted_is_lost(oracle, few_masks, hospital):
    run, ids = oracle.folder.parent, oracle.ids

    def collect(at):
        command = [sys.executable, "-c", COLLECT, ROOT, run, few_masks, at]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    for id in ids[:2]:
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    assert collect(0).returncode == 0
    before = kept(run)
    assert before.keys() == set(ids[:2])
    first = (run / "annotations.h5").read_bytes()
    for id in ids[2:4]:
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    reject(oracle.masks.parent, ids[4], "reject: unreadable")
    done = collect(0)
    whole, operations = kept(run), int(done.stdout.split()[-1])
    assert whole.keys() == set(ids[:5])
    for at in range(1, operations + 1):
        (run / "annotations.h5").write_bytes(first)
        assert collect(at).returncode == -signal.SIGKILL
        assert kept(run).keys() in (before.keys(), whole.keys())
        assert collect(0).returncode == 0
        found = kept(run)
        assert found.keys() == whole.keys()
        for id in found:
            assert found[id][:3] == whole[id][:3]
            np.testing.assert_array_equal(found[id][3], whole[id][3])


class Person:
    """Answers what is asked in a run, always in the same way: first the half of it, then the rest."""

    def __init__(self, run, truths):
        self.run, self.truths, self.handed_in = run, truths, set()

    def answer(self):
        """Hand in one more part of what is asked; returns whether there was one."""
        for folder in sorted((self.run / "annotate").glob("iteration_*")):
            ids = [row["id"] for row in read_table(folder)]
            some = [id for id in ids if (folder.name, id) not in self.handed_in][: len(ids) // 2]
            for id in some:
                self.handed_in.add((folder.name, id))
                if id == max(ids):
                    reject(folder, id, "reject: unreadable")
                else:
                    save_mask(self.truths[id], folder / "masks" / f"{id}.png")
            if some:
                return True
        return False


def finish(run, person, data_file, kills=0, rng=None, operations=0):
    """Start the run until it is done, killed up to so many times at random file operations; returns the number of kills
    and the largest number of operations of a start. After every start all that was accepted is still there."""
    killed, accepted, most = 0, {}, 0
    while True:
        at = rng.randrange(1, operations // 2) if killed < kills else 0
        begun = (run / "config.json").exists()
        options = [] if begun else ["--data", data_file, "--oracle", "folder", *OPTIONS.split(), "--iterations", 1]
        process = start(run, *options, at=at)
        out, err = process.communicate()
        if (run / "annotations.h5").exists():
            before, accepted = accepted, kept(run)
            for id, answer in before.items():
                assert accepted[id][:3] == answer[:3]
                np.testing.assert_array_equal(accepted[id][3], answer[3])
        if process.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert process.returncode == 0, out + err
        most = max(most, int(out.split()[-1]))
        if not person.answer() and "done: " in out:
            return killed, most


def test_a_run_that_asks_a_person_and_is_killed_again_and_again_ends_the_same(few_masks, hospital, tmp_path):
    seed, whole = random.randrange(10**6), tmp_path / "whole"
    rng, kills, runs = random.Random(seed), 0, 0
    _, operations = finish(whole, Person(whole, hospital[1]), few_masks)
    print(f"seed {seed}, {operations} file operations in a start")
    while kills < KILLS:
        run = tmp_path / f"run_{runs}"
        kills += finish(run, Person(run, hospital[1]), few_masks, KILLS - kills, rng, operations)[0]
        expected, found = everything(whole), everything(run)
        assert [name for name in expected if found.get(name) != expected[name]] == [], f"seed {seed}"
        assert found.keys() == expected.keys()
        runs += 1
    print(f"{kills} kills in {runs} runs: no difference, no answer lost")


# ------------------------------------------------------------------------------------------------------ real images


@pytest.mark.skipif("ISIC2017_DIR" not in os.environ, reason="ISIC2017_DIR does not name the challenge's folders")
def test_a_whole_run_on_real_images_whose_proposals_a_person_edits(go, tmp_path):
    source = Path(os.environ["ISIC2017_DIR"])
    photos, drawn, truths = tmp_path / "photos", tmp_path / "drawn", {}
    photos.mkdir(), drawn.mkdir()
    for n, pair in enumerate([pair for pair in data.find_pairs(source) if pair.part == "train"][:60]):
        shutil.copy(pair.image, photos)
        truths[pair.id] = Path(pair.mask)
        if n < 25:
            shutil.copy(pair.mask, drawn)
    make = ["folder", photos, tmp_path / "photos.h5", "--masks", drawn, "--height", 48, "--width", 64]
    subprocess.run([sys.executable, ROOT / "data.py", *map(str, make)], check=True, capture_output=True)
    options = "--initial 20 --pool 30 --test 10 --filters 4 --initial-epochs 10 --iterations 2 --learning-rate 0.003"
    run = tmp_path / "r"
    code, _, err = go(run, "--data", tmp_path / "photos.h5", "--oracle", "folder", *OPTIONS.split(), *options.split())
    assert (code, err) == (0, "")
    for iteration in range(3):
        folder = run / "annotate" / f"iteration_{iteration:02d}"
        for n, id in enumerate(asked(run, iteration)):
            (original,) = (folder / "images").glob(f"{id}.*")
            assert original.read_bytes() == (photos / original.name).read_bytes()
            proposed, mask = folder / "proposed" / f"{id}.png", folder / "masks" / f"{id}.png"
            if iteration and n == 0:
                reject(folder, id, "reject: not a lesion")
            elif iteration and n == 1 and np.asarray(Image.open(proposed)).any():
                save_mask(binary_dilation(np.asarray(Image.open(proposed)) > 0, iterations=3), mask)
            else:
                shutil.copy(truths[id], mask)
        code, _, err = go(run)
        assert (code, err) == (0, "")
    history = read_csv(run / "history.csv")
    assert [row["annotations"] for row in history] == ["20", "23", "26"]
    assert all(0 < float(row["dice"]) < 1 for row in history)


def test_short_lines_and_other_columns_of_queries_csv_are_read_rightly(tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("group,answer,id\nrandom\nrandom,,A\nrandom,reject: blurred,B\n")
    assert read_rejections(path, {"A", "B"}) == ({"B": "blurred"}, [])
