"""oracle.py: a person, here a script, answers in runs/NAME/annotate, and no answer is ever lost."""

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
from PIL import Image, ImageOps
from scipy.ndimage import binary_dilation
from test_faults import content, start

import data
import train
from answers import draw_overlay
from data import Dataset
from oracle import FolderOracle, Unanswered
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
TURNED = 6  # the EXIF orientation of a camera in portrait position


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """34 photographs of 64x96, some rotated by EXIF, and the true masks as displayed: (folder, dict of id to mask)."""
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
    """A data file of the hospital's images with masks for the ids `drawn`."""
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
    """A data file with masks for 4 images only, which become the test images."""
    return make_file(hospital, tmp_path_factory.mktemp("data") / "few.h5", sorted(hospital[1])[::9])


@pytest.fixture(scope="module")
def all_masks(hospital, tmp_path_factory):
    return make_file(hospital, tmp_path_factory.mktemp("data") / "all.h5", hospital[1])


@pytest.fixture
def go(monkeypatch, capsys):
    """Run `train.py --run RUN ARGUMENTS` in this process; returns (exit code, stdout, stderr)."""

    def go(run, *arguments):
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(run), *map(str, arguments)])
        code = train.main()
        return code or 0, *capsys.readouterr()

    return go


def read_table(folder):
    """The rows of queries.csv, also if a spreadsheet program saved it."""
    with open(folder / "queries.csv", newline="", encoding="utf-8-sig") as file:
        lines = list(file)
    return list(csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count)))


def asked(run, iteration):
    """The ids of the images that a person has to annotate."""
    return [row["id"] for row in read_table(run / "annotate" / f"iteration_{iteration:02d}")]


def reject(folder, id, answer, delimiter=","):
    """Write an answer into queries.csv as a spreadsheet program does."""
    rows = read_table(folder)
    with open(folder / "queries.csv", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([list(rows[0]), *((r["id"], r["group"], answer if r["id"] == id else "") for r in rows)])


def kept(run):
    """The content of annotations.h5, read without oracle.py: id to (iteration, hash, rejection, mask or None)."""
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
    """All results and answers of a run, without the seconds, for comparison."""
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

    # The first start asks for the initial masks and proposes none.
    code, out, err = go(run, "--data", few_masks, "--oracle", "folder", *OPTIONS.split())
    assert (code, err) == (0, "")
    folder = run / "annotate" / "iteration_00"
    assert f"{folder}: draw masks of 6 images" in out
    assert out.splitlines()[-1].endswith(f"go on with: python train.py --run {shlex.quote(str(run))}")
    assert sorted(p.name for p in folder.iterdir()) == ["README.txt", "images", "masks", "queries.csv"]
    assert "no proposed masks" in (folder / "README.txt").read_text()
    assert f"python train.py --run '{run}'" in (folder / "README.txt").read_text()
    first = asked(run, 0)
    assert {row["group"] for row in read_csv(folder / "queries.csv")} == {"initial"}
    assert len(first) == 6
    assert trained == []

    # Some masks are wrong and some are missing: each is named, and the correct ones are kept.
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

    # The other answers follow; one is a rejection, and one mask has the network's size.
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

    # Now the network proposes masks. They fit the image as an editor displays it.
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

    # One mask is copied, one is dilated, one is drawn. The fourth is missing, and the run continues without it.
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

    # The missing mask comes late. An accepted mask file is changed, which has no effect.
    save_mask(truths[second[3]], folder / "masks" / f"{second[3]}.png")
    save_mask(truths[second[0]] | binary_dilation(masks[second[0]]), folder / "masks" / f"{second[0]}.png")
    third = asked(run, 2)
    folder = run / "annotate" / "iteration_02"
    assert not set(third) & {*first, *second[:3]}
    for id in third:
        save_mask(truths[id], folder / "masks" / f"{id}.png")
    for options in (), ("--partial",):  # nothing is trained while an answer is refused, unless the person says so
        code, out, err = go(run, *options)
        assert code == 2
        assert err.count("\n") == 1
        assert f"{second[0]}.png: {second[0]} is answered already; the earlier mask is kept" in err
        assert "with --correct, this mask counts from iteration 2 on" in err
        assert (run / "iteration_02").exists() == bool(options)
    np.testing.assert_array_equal(kept(run)[second[0]][3], masks[second[0]])
    assert kept(run)[second[3]][0] == 2
    history = read_csv(run / "history.csv")
    assert [int(row["annotations"]) for row in history] == [5, 8, 8 + len({*third, second[3]})]
    assert "done: " in out

    # A finished run does nothing.
    before = everything(run)
    code, out, err = go(run)
    assert "3 iterations are done already" in out
    assert "with --correct, this mask counts for --final-steps alone" in err
    assert everything(run) == before


@pytest.mark.slow
def test_masks_that_come_while_an_iteration_is_trained_are_in_the_final_network(
    go, hospital, few_masks, tmp_path, monkeypatch
):
    run, fit = tmp_path / "run", Trainer.fit
    go(run, "--data", few_masks, "--oracle", "folder", *OPTIONS.split())
    first = asked(run, 0)
    for id in first[:-1]:
        save_mask(hospital[1][id], run / "annotate" / "iteration_00" / "masks" / f"{id}.png")
    go(run, "--partial")
    second = asked(run, 1)
    for id in second[:-1]:
        save_mask(hospital[1][id], run / "annotate" / "iteration_01" / "masks" / f"{id}.png")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        go(run, "--partial")
    monkeypatch.setattr(Trainer, "fit", fit)
    save_mask(hospital[1][first[-1]], run / "annotate" / "iteration_00" / "masks" / f"{first[-1]}.png")
    save_mask(hospital[1][second[-1]], run / "annotate" / "iteration_01" / "masks" / f"{second[-1]}.png")
    assert "2 answers accepted" in go(run, "--final-steps", 2)[1]
    (row,) = read_csv(run / "final" / "history.csv")
    assert (row["iteration"], int(row["annotations"])) == ("0", len(first) + len(second))


@pytest.mark.slow
def test_true_masks_from_a_person_give_the_same_run_as_the_simulated_oracle(go, hospital, all_masks, tmp_path):
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


def test_without_test_images_nothing_is_measured_and_the_run_says_so(go, few_masks, hospital, tmp_path):
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


def test_wait_continues_as_soon_as_every_image_is_answered(go, few_masks, hospital, tmp_path, monkeypatch):
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


@pytest.mark.slow
def test_a_correction_counts_from_the_next_iteration_and_an_iteration_done_anew_is_the_same(
    go, all_masks, hospital, tmp_path, monkeypatch
):
    run, trained, fit = tmp_path / "r", {}, Trainer.fit

    def spy(self, positions, labels, iteration):
        trained[iteration] = dict(zip(self.dataset.ids[positions], (label.tolist() for label in labels)))
        fit(self, positions, labels, iteration)

    monkeypatch.setattr(Trainer, "fit", spy)
    go(run, "--data", all_masks, "--oracle", "folder", *OPTIONS.split(), "--pseudo-first", 0)
    first, folder = asked(run, 1), run / "annotate" / "iteration_01"
    for id in first[:3]:
        save_mask(hospital[1][id], folder / "masks" / f"{id}.png")
    reject(folder, first[3], "reject: blurred")
    assert go(run)[0] == 0
    better = binary_dilation(hospital[1][first[0]], iterations=5)
    save_mask(better, folder / "masks" / f"{first[0]}.png")
    (folder / "masks" / f"{first[1]}.png").unlink()
    reject(folder, first[1], "reject: blurred")
    save_mask(hospital[1][first[3]], folder / "masks" / f"{first[3]}.png")
    code, out, _ = go(run, "--correct", "--partial")
    assert (code, out.count("replaces the earlier")) == (0, 3)
    second = run / "annotate" / "iteration_02" / "masks"
    save_mask(hospital[1][asked(run, 2)[0]], second / f"{asked(run, 2)[0]}.png")
    code, out, _ = go(run, "--partial")
    assert code == 0
    assert trained[1][first[0]] == at_size(hospital[1][first[0]])
    assert trained[2][first[0]] == at_size(better)
    assert first[1] in trained[1]
    assert first[1] not in trained[2]
    assert first[3] not in trained[1]
    assert trained[2][first[3]] == at_size(hospital[1][first[3]])
    assert list(trained[2])[:7] == list(trained[1])[:7]  # the order of the training set
    before = everything_with_corrections(run)
    for iteration in 1, 2:
        shutil.rmtree(run / f"iteration_{iteration:02d}")
    assert go(run)[0] == 0
    assert everything_with_corrections(run) == before


def everything_with_corrections(run):
    found = {name: what for name, what in content(run).items() if not name.startswith("annotations.h5/")}
    return {**found, "annotations.h5": rows(run)}


def finished(trainer, parts, run, oracle):
    """In place of train.run_loop: it takes the answers in, without a training."""
    oracle.collect()
    return [{"iteration": "0", "dice": ""}]


REFUSED = {  # what is handed in, and the exit code of a run that goes on to its end
    "nothing": (lambda truth, folder, id: None, 0),
    "a right mask": (lambda truth, folder, id: save_mask(truth, folder / "masks" / f"{id}.png"), 0),
    "clutter": (lambda truth, folder, id: (folder / "masks" / "@eaDir").mkdir(), 0),
    "an inverted mask": (lambda truth, folder, id: save_mask(~truth, folder / "masks" / f"{id}.png"), 0),
    "an empty mask": (lambda truth, folder, id: save_mask(truth & False, folder / "masks" / f"{id}.png"), 2),
    "a file of no image": (lambda truth, folder, id: save_mask(truth, folder / "masks" / "somebody.png"), 2),
    "a table of other images": (lambda truth, folder, id: (folder / "queries.csv").write_text("id,answer\n1,\n"), 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_exit_code_is_2_if_anything_was_refused_though_the_run_went_on(
    go, oracle, few_masks, hospital, monkeypatch, what
):
    submit, expected = REFUSED[what]
    run, id = oracle.folder.parent, oracle.ids[0]
    shutil.move(run, run.with_name("asked"))
    monkeypatch.setattr(train, "run_loop", finished)
    assert go(run, "--data", few_masks, "--oracle", "folder", *OPTIONS.split())[0] == 0
    shutil.copytree(run.with_name("asked"), run, dirs_exist_ok=True)
    submit(hospital[1][id], oracle.masks.parent, id)
    code, out, err = go(run)
    assert (code, "done: " in out) == (expected, True)
    assert ("error: " in err) == (expected == 2)


def test_without_a_person_images_without_masks_are_refused(go, few_masks, tmp_path):
    with pytest.raises(UserError, match=r"few\.h5: .* has no mask \(26 such images .* --oracle folder"):
        go(tmp_path / "r", "--data", few_masks, *OPTIONS.split())
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------------------- submitted answers


@pytest.fixture
def oracle(few_masks, tmp_path):
    """A function that makes a new FolderOracle, as each start of a run does; 8 images have been queried."""
    run = tmp_path / "run"
    with Dataset(few_masks) as dataset:
        positions = np.flatnonzero(~dataset.has_mask)[:8]
        (run / ".queries_00").mkdir(parents=True)
        write_csv(run / ".queries_00" / "queries.csv", ["id", "group"], [(dataset.ids[n], "random") for n in positions])
        groups, shape = {"random": positions}, (8, *SIZE)
        maps = np.random.default_rng(0).random((2, *shape)).astype(np.float32)

        def make(ask=True, **switches):
            oracle = FolderOracle(run, dataset, last=2, **switches)
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


WAYS = {  # correct ways to save a mask, bool (h, w)
    "png": lambda mask, path: save_mask(mask, path),
    "bit": lambda mask, path: Image.fromarray(mask).save(path),
    "labels 0 and 1": lambda mask, path: Image.fromarray(mask.astype(np.uint8)).save(path),
    "rgb": lambda mask, path: Image.fromarray(np.uint8(255) * mask).convert("RGB").save(path),
    "white on transparent": lambda mask, path: as_rgba(mask).save(path),
    "palette": lambda mask, path: Image.fromarray(np.uint8(255) * mask).convert("P").save(path),
    "tif": lambda mask, path: save_mask(mask, path.with_suffix(".tif")),
    "bmp": lambda mask, path: save_mask(mask, path.with_suffix(".BMP")),
    "gif": lambda mask, path: save_mask(mask, path.with_suffix(".gif")),
    "16 bits": lambda mask, path: Image.fromarray(mask.astype(np.uint16)).save(path),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_is_accepted_as_editors_save_it(oracle, hospital, way):
    id = oracle.ids[3]
    WAYS[way](hospital[1][id], oracle.masks / f"{id}.png")
    assert oracle(ask=False).collect() == []
    np.testing.assert_array_equal(kept(oracle.folder.parent)[id][3], hospital[1][id])


WRONG = {  # wrong answers, and a part of the message about each
    "grey": (
        lambda mask, path: Image.fromarray(np.indices(mask.shape).sum(0).astype(np.uint8)).save(path),
        "not a mask",
    ),
    "empty": (lambda mask, path: save_mask(0 * mask, path), "empty"),
    "a speck": (lambda mask, path: save_mask(np.arange(mask.size).reshape(mask.shape) == 700, path), "too small"),
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
    "a folder": (lambda mask, path: path.mkdir(), "not a file"),
    "another name": (
        lambda mask, path: save_mask(mask, path.with_name(f"{path.stem}_mask.png")),
        "_mask.png: no image",
    ),
    "two": (lambda mask, path: [save_mask(mask, path.with_suffix(s)) for s in (".png", ".tif")], ".tif are both for"),
    "with a rejection": (
        lambda mask, path: save_mask(mask, path) or say(path, "reject"),
        "also rejected in queries.csv",
    ),
    "no answer": (lambda mask, path: say(path, "maybe"), "'maybe' for"),
    "no such image": (lambda mask, path: say(path, "reject", "somebody"), "is missing"),
    "no table": (lambda mask, path: (path.parent.parent / "queries.csv").write_text("see my mail"), "first line"),
    "an empty table": (lambda mask, path: (path.parent.parent / "queries.csv").write_text(""), "first line"),
}


def say(path, answer, name=None):
    """Write the table with an answer for the image of this mask, which is called `name` there."""
    rows = [(row["id"], row["group"], "") for row in read_table(path.parent.parent)]
    rows = [(name or id, group, answer) if id == path.stem else (id, group, "") for id, group, _ in rows]
    write_csv(path.parent.parent / "queries.csv", ["id", "group", "answer"], rows)


@pytest.mark.parametrize("way", WRONG)
def test_wrong_answers_are_named_and_correct_ones_are_kept(oracle, hospital, way, capsys):
    right, wrong = oracle.ids[1], oracle.ids[4]  # this image is rotated by EXIF
    hand_in, words = WRONG[way]
    hand_in(hospital[1][wrong], oracle.masks / f"{wrong}.png")
    save_mask(hospital[1][right], oracle.masks / f"{right}.png")
    for clutter in "Thumbs.db", ".DS_Store", f"._{right}.png", "desktop.ini":
        (oracle.masks / clutter).write_text("clutter")
    capsys.readouterr()
    with pytest.raises(Unanswered) as waiting:
        oracle()
    assert waiting.value.invalid
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith(f"error: {oracle.folder / 'iteration_00'}")
    assert words in err
    assert out.count("missing: ") == 7
    assert kept(oracle.folder.parent).keys() == {right}


def test_an_answer_in_use_never_changes_by_itself(oracle, hospital):
    run, (drawn, unread) = oracle.folder.parent, oracle.ids[:2]
    save_mask(hospital[1][drawn], oracle.masks / f"{drawn}.png")
    reject(oracle.masks.parent, unread, "reject: unreadable", "\t")
    assert oracle(ask=False).collect() == []
    before = kept(run)
    assert (before[unread][2], before[drawn][2]) == ("unreadable", "")
    stamp = (run / "annotations.h5").stat().st_mtime_ns
    assert oracle(ask=False).collect() == []
    assert (run / "annotations.h5").stat().st_mtime_ns == stamp  # nothing new, so nothing is written
    oracle(partial=True)

    save_mask(~hospital[1][drawn], oracle.masks / f"{drawn}.png")
    say(oracle.masks / f"{unread}.png", "")
    save_mask(hospital[1][unread], oracle.masks / f"{unread}.png")
    wrong = oracle(ask=False).collect()
    assert sorted(line.split(": ")[-1] for line in wrong) == sorted(
        f"{id} is answered already; the earlier {kept} is kept; with --correct, this mask counts from iteration 1 on"
        for id, kept in ((drawn, "mask"), (unread, "rejection"))
    )
    shutil.rmtree(oracle.masks)
    assert oracle(ask=False).collect() == []
    say(oracle.masks / f"{drawn}.png", "reject")
    (line,) = oracle(ask=False).collect()
    assert "the earlier mask is kept; with --correct, this rejection counts from iteration 1 on" in line
    after = kept(run)
    assert after.keys() == before.keys()
    assert all(after[id][:3] == before[id][:3] for id in before)
    np.testing.assert_array_equal(after[drawn][3], hospital[1][drawn])


def test_a_mask_that_is_saved_again_as_it_was_is_no_change(oracle, hospital, capsys):
    run, id = oracle.folder.parent, oracle.ids[1]
    path = oracle.masks / f"{id}.png"
    save_mask(hospital[1][id], path)
    oracle(partial=True)
    before = rows(run)
    with Image.open(path) as picture:
        picture.save(path, compress_level=0)
    capsys.readouterr()
    assert oracle(ask=False).collect() == []
    assert capsys.readouterr() == ("", "")
    assert rows(run) == before


@pytest.mark.parametrize("how", ["removed", "older", "newer"])
def test_annotations_that_another_program_changes_meanwhile_are_never_overwritten(oracle, hospital, tmp_path, how):
    path, ids = oracle.folder.parent / "annotations.h5", oracle.ids
    for id in ids[:2]:
        before = path.read_bytes() if path.exists() else b""
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
        old = oracle(ask=False)
        assert old.collect() == []
    save_mask(hospital[1][ids[2]], oracle.masks / f"{ids[2]}.png")
    if how == "newer":
        assert oracle(ask=False).collect() == []
    elif how == "older":
        path.write_bytes(before)
    else:
        path.unlink()
    now = path.read_bytes() if path.exists() else None
    save_mask(hospital[1][ids[3]], oracle.masks / f"{ids[3]}.png")
    with pytest.raises(UserError, match=r"annotations\.h5: another program has changed or removed it"):
        old.collect()
    assert (path.read_bytes() if path.exists() else None) == now
    assert oracle(ask=False).collect() == []
    assert kept(oracle.folder.parent).keys() == set(ids[:4])


def test_a_copy_of_the_persons_folder_beside_it_is_named_and_other_files_do_no_harm(oracle, hospital):
    folder, id = oracle.masks.parent, oracle.ids[0]
    shutil.make_archive(folder, "zip", folder)
    save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    assert oracle(ask=False).collect() == []
    copy = folder.with_name(f"{folder.name} (copy)")
    shutil.copytree(folder, copy)
    assert oracle(ask=False).collect() == [f"{copy}: not a folder of this run; move its masks to that of the iteration"]
    assert kept(oracle.folder.parent).keys() == {id}


def rows(run):
    """Every row of annotations.h5 with its mask, read without oracle.py: a list of (id, iteration, rejection, mask)."""
    with h5py.File(run / "annotations.h5") as file:
        found, ids = [], file["ids"].asstr()[:].tolist()
        for row, id in enumerate(ids):
            rejection = file["rejections"].asstr()[row]
            name = f"corrections/{row}" if id in ids[:row] else f"masks/{id}"
            assert (name in file) == (rejection == "")
            found.append((id, int(file["iterations"][row]), rejection, None if rejection else file[name][:].tolist()))
    return found


def counting(oracle, iteration, id):
    """What the image has in the training set of an iteration, by the answers of all iterations up to it: the mask,
    "rejected" or None."""
    found, position = None, oracle.positions[list(oracle.ids).index(id)]
    for k in range(iteration + 1):
        answers = oracle(ask=False).answers(k, oracle.positions)
        if position in answers.positions:
            found = answers.masks[answers.positions.tolist().index(position)].tolist()
        elif position in answers.rejected:
            found = "rejected"
    return found


def hand_in(oracle, truths, id, what):
    """Hand in a mask, bool (h, w), or the word "rejected", in place of an earlier answer."""
    path = oracle.masks / f"{id}.png"
    path.unlink(missing_ok=True)
    say(path, "reject: blurred" if isinstance(what, str) else "")
    if not isinstance(what, str):
        save_mask(what, path)


def at_size(what):
    """An answer as the training set has it."""
    return what if isinstance(what, str) else shrink_mask(Image.fromarray(np.uint8(255) * what), *SIZE).tolist()


def changes(truth):
    """Pairs of an answer and another one."""
    larger = binary_dilation(truth, iterations=4)
    return {"better mask": (truth, larger), "rejected": (truth, "rejected"), "mask after all": ("rejected", larger)}


@pytest.mark.parametrize("change", changes(np.zeros((1, 1), bool)))
def test_an_answer_that_changes_before_it_is_used_is_replaced(oracle, hospital, capsys, change):
    run, id, other = oracle.folder.parent, oracle.ids[1], oracle.ids[2]
    first, second = changes(hospital[1][id])[change]
    save_mask(hospital[1][other], oracle.masks / f"{other}.png")
    for answer in first, second:
        hand_in(oracle, hospital[1], id, answer)
        capsys.readouterr()
        assert oracle(ask=False).collect() == []
    out, err = capsys.readouterr()
    assert (out.count(f"of {id} replaces the earlier"), err) == (1, "")
    oracle(partial=True)
    assert counting(oracle, 0, id) == at_size(second)
    assert counting(oracle, 0, other) == at_size(hospital[1][other])
    assert [row[:2] for row in rows(run) if row[0] == id] == [(id, 0), (id, 0)]  # both are kept
    assert [row[3] for row in rows(run) if row[0] == id and row[3]] == [
        answer.astype(int).tolist() for answer in (first, second) if not isinstance(answer, str)
    ]


@pytest.mark.parametrize("change", changes(np.zeros((1, 1), bool)))
def test_an_answer_in_use_changes_only_with_correct_and_from_the_next_iteration_on(oracle, hospital, capsys, change):
    run, id, other = oracle.folder.parent, oracle.ids[1], oracle.ids[2]
    first, second = changes(hospital[1][id])[change]
    save_mask(hospital[1][other], oracle.masks / f"{other}.png")
    hand_in(oracle, hospital[1], id, first)
    oracle(partial=True)
    before = rows(run)
    hand_in(oracle, hospital[1], id, second)
    (line,) = oracle(ask=False).collect()
    assert f"{id} is answered already; the earlier" in line
    assert line.endswith("counts from iteration 1 on")
    assert rows(run) == before
    capsys.readouterr()
    assert oracle(ask=False, correct=True).collect() == []
    out, err = capsys.readouterr()
    assert (out.count("replaces the earlier"), out.count(f"of {id} "), out.count("from iteration 1 on")) == (1, 1, 1)
    assert err == ""
    for _ in range(2):  # the second time nothing is new
        assert rows(run)[: len(before)] == before
        assert [row[:2] for row in rows(run)[len(before) :]] == [(id, 1)]
        assert counting(oracle, 0, id) == at_size(first)  # what an iteration that is done anew uses
        assert [counting(oracle, k, id) for k in (1, 2)] == 2 * [at_size(second)]
        assert oracle(ask=False).collect() == []


def test_a_correction_after_the_last_iteration_is_for_the_final_network_alone(oracle, hospital, capsys):
    run, id = oracle.folder.parent, oracle.ids[1]
    save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    oracle(partial=True)
    for iteration in 1, 2:
        oracle(ask=False).ask(iteration, {})
    before = rows(run)
    save_mask(binary_dilation(hospital[1][id]), oracle.masks / f"{id}.png")
    (line,) = oracle(ask=False).collect()
    assert "with --correct, this mask counts for --final-steps alone" in line
    assert rows(run) == before
    assert oracle(ask=False, correct=True).collect() == []
    assert "1 answers accepted; only --final-steps can still use them" in capsys.readouterr().out
    assert len(rows(run)) == len(before) + 1


@pytest.mark.parametrize("spoil", ["0012,random\n", "", None])
def test_a_table_that_is_deleted_is_written_anew(oracle, hospital, capsys, spoil):
    path, id = oracle.masks.parent / "queries.csv", oracle.ids[0]
    before = path.read_bytes()
    reject(oracle.masks.parent, id, "reject: blurred")
    assert oracle(ask=False).collect() == []
    if spoil is not None:
        path.write_text(spoil)
        (line,) = oracle(ask=False).collect()
        assert line.startswith(f"{path}: ")
        assert "move the file aside and start again" in line
    path.unlink()
    capsys.readouterr()
    assert oracle(ask=False).collect() == []
    assert f"{path} was missing and is written anew" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert kept(oracle.folder.parent)[id][2] == "blurred"  # the rejection is kept


def test_an_image_whose_name_a_spreadsheet_program_changes_is_not_rejected_for_another(tmp_path):
    paths = [photograph(tmp_path, f"{id}.png", "RGB", None) for id in ("0012", "12", "5")]
    oracle = ask_about(paths, tmp_path / "run")
    folder = oracle.run / "annotate" / "iteration_00"
    rows_of_excel = "id,group,answer\n12,random,reject: blurred\n12,random,\n5,random,\n"
    (folder / "queries.csv").write_text(rows_of_excel)
    save_mask(np.tri(32), folder / "masks" / "5.png")
    with Dataset(oracle.run / "d.h5") as dataset:
        (line,) = FolderOracle(oracle.run, dataset, last=2).collect()
    assert "changed the id 0012 to 12" in line
    assert kept(oracle.run).keys() == {"5"}


def test_two_different_answers_in_two_folders_are_both_refused(oracle, hospital):
    id, second = oracle.ids[1], oracle.folder / "iteration_01"
    shutil.copytree(oracle.masks.parent, second)
    shutil.copytree(oracle.folder.parent / ".queries_00", oracle.folder.parent / ".queries_01")
    save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    save_mask(binary_dilation(hospital[1][id]), second / "masks" / f"{id}.png")
    (line,) = oracle(ask=False).collect()
    assert line.endswith(f"hold different answers for {id}; remove one of them")
    shutil.copy(oracle.masks / f"{id}.png", second / "masks")
    assert oracle(ask=False).collect() == []
    assert counting(oracle, 0, id) == at_size(hospital[1][id])


def test_a_changed_file_that_is_no_mask_does_not_replace_a_mask(oracle, hospital):
    run, id = oracle.folder.parent, oracle.ids[1]
    save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    oracle(ask=False).collect()
    before = rows(run)
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:-60]), lambda path: save_mask(np.eye(9), path)):
        spoil(oracle.masks / f"{id}.png")
        assert len(oracle(ask=False).collect()) == 1
        assert rows(run) == before


INVERTED = {  # four masks each, and the words that are expected
    "black on white": (lambda truth: ~truth, "4 of 4 masks cover all four corners"),
    "all white": (lambda truth: truth | True, "4 of 4 masks cover all four corners"),
    "a white layer in a black frame": (
        lambda truth: np.pad(~truth[1:-1, 1:-1], 1),
        "4 of 4 masks cover over half of their picture",
    ),
}


@pytest.mark.parametrize("kind", INVERTED)
def test_masks_that_may_be_inverted_are_accepted_with_one_warning(oracle, hospital, capsys, kind):
    draw, words = INVERTED[kind]
    for id in oracle.ids[:4]:
        save_mask(draw(hospital[1][id]), oracle.masks / f"{id}.png")
    capsys.readouterr()
    assert oracle(ask=False).collect() == []
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert err.count("\n") == 1
    assert words in err
    assert kept(oracle.folder.parent).keys() == set(oracle.ids[:4])
    for id in oracle.ids[4:]:  # one correct mask more, and no warning
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    assert oracle(ask=False).collect() == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["{}.json", "{}.xcf", "{}.png~", "{}.bak", "{}.png.bak", "{}.JPG"])
def test_a_mask_is_taken_whatever_its_editor_leaves_beside_it(oracle, hospital, name):
    id = oracle.ids[3]
    path = oracle.masks / name.format(id)
    Image.fromarray(np.uint8(255) * ~hospital[1][id]).save(path, "JPEG" if name.endswith("JPG") else "PNG")
    save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    assert oracle(ask=False).collect() == []
    np.testing.assert_array_equal(kept(oracle.folder.parent)[id][3], hospital[1][id])


@pytest.mark.parametrize("name", ["{}.json", "{}.xcf", "{}.png~", "{}.bak", "{}.png.bak", "{}.jpg"])
def test_a_file_that_is_no_mask_is_named_if_it_is_alone(oracle, hospital, name):
    path = oracle.masks / name.format(oracle.ids[3])
    if "~" in name or "bak" in name:
        Image.fromarray(np.uint8(255) * hospital[1][oracle.ids[3]]).save(path, "PNG")
    else:
        path.write_text("{}")
    (line,) = oracle(ask=False).collect()
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["{}_segmentation.png", "{}_Segmentation.PNG", "{}.TIFF", "{}.bmp", "{}.webp"])
def test_a_mask_is_found_by_any_usual_name(oracle, hospital, name):
    id = oracle.ids[3]
    Image.fromarray(np.uint8(255) * hospital[1][id]).save(oracle.masks / name.format(id.upper()), lossless=True)
    for folder in "@eaDir", "#recycle", "lost+found", "__MACOSX", ".hidden":
        (oracle.masks / folder).mkdir()
    assert oracle(ask=False).collect() == []
    np.testing.assert_array_equal(kept(oracle.folder.parent)[id][3], hospital[1][id])


def test_partial_continues_with_some_answers_and_late_ones_count_from_the_next_iteration(oracle, hospital):
    run = oracle.folder.parent
    with pytest.raises(Unanswered):
        oracle(partial=True)  # at least one mask is needed
    save_mask(hospital[1][oracle.ids[5]], oracle.masks / f"{oracle.ids[5]}.png")
    save_mask(hospital[1][oracle.ids[2]], oracle.masks / f"{oracle.ids[2]}.png")
    oracle(partial=True)
    positions, masks, rejected = oracle(ask=False).answers(0, oracle.positions)
    assert positions.tolist() == oracle.positions[[2, 5]].tolist()  # in the order of the query
    for position, mask in zip(positions, masks):
        picture = Image.fromarray(255 * hospital[1][oracle.dataset.ids[position]].astype(np.uint8))
        np.testing.assert_array_equal(mask, shrink_mask(picture, *SIZE))
    assert len(rejected) == 0

    save_mask(hospital[1][oracle.ids[0]], oracle.masks / f"{oracle.ids[0]}.png")
    reject(oracle.masks.parent, oracle.ids[7], "reject")
    late = oracle(ask=False)
    late.collect()
    assert len(late.answers(0, oracle.positions).positions) == 2  # an earlier training set does not change
    answers = late.answers(1, [])
    assert (answers.positions.tolist(), answers.rejected.tolist()) == ([oracle.positions[0]], [oracle.positions[7]])
    assert kept(run)[oracle.ids[7]][:3] == (1, "", "no reason given")


PHOTOS = {  # a picture with an orientation, as cameras and programs save it: suffix, mode
    "jpeg": (".jpg", "RGB"),
    "grey jpeg": (".JPG", "L"),
    "print jpeg": (".jpeg", "CMYK"),
    "png": (".png", "RGB"),
    "transparent png": (".png", "RGBA"),
    "palette png": (".png", "P"),
    "tiff": (".tif", "RGB"),
    "webp": (".webp", "RGB"),
}


def photograph(folder, name, mode, turned):
    """Save a square picture of noise with an EXIF orientation. Returns its path."""
    exif, noise = Image.Exif(), np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
    if turned:
        exif[0x0112] = turned
    Image.fromarray(noise).convert(mode).save(folder / name, exif=exif)
    return folder / name


def ask_about(paths, run, propose=None):
    """A FolderOracle that has asked about these pictures, whose ids are their names."""
    with Dataset(data_of(paths, run)) as dataset:
        (run / ".queries_00").mkdir()
        write_csv(run / ".queries_00" / "queries.csv", ["id", "group"], [(id, "random") for id in dataset.ids])
        oracle = FolderOracle(run, dataset, last=2)
        with pytest.raises(Unanswered):
            oracle.ask(0, {"random": np.arange(len(paths))}, propose)
        oracle.collect()
    return oracle


def data_of(paths, run):
    run.mkdir()
    rows = [data.Row(p.stem, "train", (32, 32), np.zeros((16, 16, 1), "u1"), None, str(p)) for p in paths]
    data.write_dataset(run / "d.h5", rows, len(rows), 16, 16, 1, "photos", folder=str(paths[0].parent))
    return run / "d.h5"


@pytest.mark.parametrize("turned", range(2, 9))
@pytest.mark.parametrize("kind", PHOTOS)
def test_pictures_with_an_orientation_are_handed_out_upright(tmp_path, kind, turned):
    suffix, mode = PHOTOS[kind]
    path = photograph(tmp_path, f"photo{suffix}", mode, turned)
    with Image.open(path) as original:
        expected = ImageOps.exif_transpose(original).convert("RGBA" if mode == "RGBA" else "RGB")
    folder = ask_about([path], tmp_path / "run").run / "annotate" / "iteration_00" / "images"
    assert [found.name for found in folder.iterdir()] == ["photo.png"]
    with Image.open(folder / "photo.png") as found:
        assert (found.format, dict(found.getexif())) == ("PNG", {})
        np.testing.assert_array_equal(found.convert(expected.mode), expected)


def test_pictures_without_an_orientation_are_handed_out_byte_for_byte(tmp_path):
    names = {f"photo{n}{suffix}": mode for n, (suffix, mode) in enumerate(PHOTOS.values())}
    paths = [photograph(tmp_path, name, mode, None) for name, mode in names.items()]
    folder = ask_about(paths, tmp_path / "run").run / "annotate" / "iteration_00" / "images"
    assert {found.name: found.read_bytes() for found in folder.iterdir()} == {p.name: p.read_bytes() for p in paths}


@pytest.mark.parametrize("turned", [2, 3, 4, 5, 6, 7, 8, None])
def test_a_mask_that_was_drawn_on_the_unturned_picture_is_noticed(tmp_path, turned, capsys):
    path = photograph(tmp_path, "photo.jpg", "RGB", turned)
    lesion = np.zeros((32, 32), np.uint8)
    lesion[2:9, 16:26] = 255  # as displayed
    exif = Image.Exif()
    exif[0x0112] = {6: 8, 8: 6}.get(turned, turned or 1)  # the inverse turn
    Image.fromarray(lesion).save(tmp_path / "m.tif", exif=exif)
    with Image.open(tmp_path / "m.tif") as picture:
        raw = np.asarray(ImageOps.exif_transpose(picture))  # as the camera's pixels lie
    proposal = np.float32(np.asarray(Image.fromarray(lesion).resize((16, 16))) > 99)
    oracle = ask_about([path], tmp_path / "run", lambda _: [(proposal, proposal)])
    masks = oracle.run / "annotate" / "iteration_00" / "masks"
    for mask, warned in ((raw, turned is not None), (lesion, False)):
        Image.fromarray(mask).save(masks / "photo.png")
        capsys.readouterr()
        with Dataset(oracle.run / "d.h5") as dataset:
            again = FolderOracle(oracle.run, dataset, last=2)
            assert again.collect() == []
        err = capsys.readouterr().err
        assert err.count("warning: ") == err.count("\n") == warned
        assert (f"{masks / 'photo.png'}: " in err and "orientation (EXIF)" in err) == warned


def test_proposals_lie_on_the_image_as_it_is_displayed(oracle):
    """The maps of the fixture are noise, so that every pixel would show a wrong rotation of a proposal."""
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
def test_a_missing_or_changed_original_is_named(few_masks, hospital, tmp_path, spoil):
    photos = shutil.copytree(hospital[0], tmp_path / "photos")
    with Dataset(few_masks) as dataset:
        dataset.folder = str(photos)
        spoil(photos / dataset.files[2])
        oracle = FolderOracle(tmp_path, dataset, last=2)
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

# Collects the answers and kills itself at the n-th file operation in the run's folder; prints the number of operations.
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
    oracle.FolderOracle(Path(run), dataset, last=2).collect()
print(count)
"""


@pytest.mark.slow
def test_no_accepted_answer_is_lost_wherever_collecting_is_killed(oracle, few_masks, hospital):
    run, ids = oracle.folder.parent, oracle.ids

    def collect(at):
        command = [sys.executable, "-c", COLLECT, ROOT, run, few_masks, at]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    for id in ids[:2]:
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    assert collect(0).returncode == 0
    assert kept(run).keys() == set(ids[:2])
    first = (run / "annotations.h5").read_bytes()
    for id in ids[2:4]:
        save_mask(hospital[1][id], oracle.masks / f"{id}.png")
    save_mask(binary_dilation(hospital[1][ids[0]]), oracle.masks / f"{ids[0]}.png")  # a correction
    reject(oracle.masks.parent, ids[4], "reject: unreadable")
    before, done = rows(run), collect(0)
    whole, operations = rows(run), int(done.stdout.split()[-1])
    assert whole[:2] == before
    assert sorted(row[0] for row in whole) == sorted([ids[0], *ids[:5]])
    for at in range(1, operations + 1):
        (run / "annotations.h5").write_bytes(first)
        assert collect(at).returncode == -signal.SIGKILL
        assert rows(run) in (before, whole)
        assert collect(0).returncode == 0
        assert rows(run) == whole


class Person:
    """Answers the queries of a run in a fixed way: half of the images of a folder at a time."""

    def __init__(self, run, truths):
        self.run, self.truths, self.handed_in = run, truths, set()

    def answer(self):
        """Submit the next answers; returns whether there were any."""
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
    """Start the run until it is done, with up to `kills` kills at random file operations. Returns the number of kills
    and the largest number of operations of a start. Checks after every start that no accepted answer is lost."""
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


@pytest.mark.slow
def test_a_run_with_a_person_killed_again_and_again_ends_the_same(few_masks, hospital, tmp_path):
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


@pytest.mark.slow
@pytest.mark.skipif("ISIC2017_DIR" not in os.environ, reason="ISIC2017_DIR does not name the challenge's folders")
def test_a_whole_run_on_real_images_with_edited_proposals(go, tmp_path):
    source = Path(os.environ["ISIC2017_DIR"])
    photos, drawn, truths = tmp_path / "photos", tmp_path / "drawn", {}
    photos.mkdir(), drawn.mkdir()
    for n, pair in enumerate([pair for pair in data.find_pairs(source)[0] if pair.part == "train"][:60]):
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
