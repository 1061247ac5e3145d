"""Extreme cases that are not errors: a network that predicts no lesion or only lesion, equal scores, one image, numbers
so large that they mean "all". And training that diverges or lacks memory."""

import itertools

import numpy as np
import pytest
from conftest import write_blobs
from PIL import Image

import predict
import train
import trainer
from data import Dataset
from trainer import Trainer
from unet import LOSSES, build_unet, save_unet, tf
from utils import UserError, read_csv

OPTIONS = """
    --filters 1 --initial 4 --pool 12 --test 3 --initial-epochs 1 --active-epochs 1 --batch-size 4 --passes 2
    --iterations 1 --no-detection 1 --most-uncertain 1 --random 2 --pseudo-start 1 --pseudo-first 2 --pseudo-step 1
"""
FIGURES = {"examples.png", "scores.png"}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.h5", 19, 32, 32)


@pytest.fixture
def run(data_file, tmp_path, monkeypatch):
    """Run train.py in this process. Returns the run's folder."""

    def run(*arguments):
        folder = tmp_path / "r"
        command = ["train.py", "--run", folder, "--data", data_file, *OPTIONS.split(), *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        train.main()
        return folder

    return run


def constant_unet(logit):
    """Like `build_unet`, but the network predicts sigmoid(logit) at every pixel."""

    def build(*arguments, **options):
        model = build_unet(*arguments, **options)
        layer = model.get_layer("probability")
        layer.set_weights([np.zeros(layer.kernel.shape), np.full(1, logit)])
        return model

    return build


def test_a_collapse_shows_without_test_images_too(run, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "build_unet", constant_unet(-25))
    run("--learning-rate", "1e-12", "--test", "0")
    assert capsys.readouterr().out.count("the network has collapsed: it predicts only skin") == 2


def assert_figures_are_drawn(folder):
    for path in folder.iterdir():
        if path.suffix == ".png":
            with Image.open(path) as figure:
                assert np.ptp(np.asarray(figure.convert("L"))) > 100
    assert {path.name for path in folder.iterdir()} >= FIGURES


@pytest.mark.slow
@pytest.mark.parametrize(("logit", "distance"), [(-25, "both"), (0, "inside"), (25, "none")])
def test_equal_scores_and_empty_or_full_predictions_are_no_error(run, data_file, monkeypatch, capsys, logit, distance):
    """Logit 25: every pixel is lesion; -25: none is; 0: the probability is 0.5 everywhere, which is not lesion."""
    monkeypatch.setattr(trainer, "build_unet", constant_unet(logit))
    folder = run("--learning-rate", "1e-12", "--distance", distance)
    collapsed = f"the network has collapsed: it predicts only {'lesion' if logit > 0 else 'skin'}"
    assert capsys.readouterr().out.count(collapsed) == 2
    rows = read_csv(folder / "history.csv")
    assert [(row["annotations"], row["pseudo_labels"]) for row in rows] == [("4", "0"), ("8", "2")]
    for row in rows:
        found = [float(row[name]) for name in ("sensitivity", "specificity")]
        assert found == ([1, 0] if logit > 0 else [0, 1])
    with Dataset(data_file) as dataset:
        areas = {id: mask.mean() for id, mask in zip(dataset.ids, dataset.masks(range(19)))}
    scores = read_csv(folder / "iteration_01" / "scores.csv")
    assert [float(row["uncertainty"]) for row in scores] == [0.0] * 12
    for row in scores:
        area = areas[row["id"]]
        assert float(row["dice"]) == pytest.approx(2 * area / (area + 1) if logit > 0 else 0)
    queries = read_csv(folder / "iteration_01" / "queries.csv")
    groups = ["no_detection", "most_uncertain", "random", "random", "pseudo", "pseudo"]
    assert [row["group"] for row in queries] == groups
    assert len({row["id"] for row in queries}) == len(queries)
    assert_figures_are_drawn(folder / "iteration_01")


def test_one_initial_image_one_in_the_pool_and_one_for_test(run, tmp_path):
    data_file = write_blobs(tmp_path / "three.h5", 3, 32, 32)
    one = [
        "--initial",
        "1",
        "--pool",
        "1",
        "--test",
        "1",
        "--no-detection",
        "0",
        "--most-uncertain",
        "0",
        "--random",
        "1",
    ]
    folder = run("--data", data_file, *one, "--iterations", "9")
    rows = read_csv(folder / "history.csv")
    assert [row["annotations"] for row in rows] == ["1", "2"]  # then the pool is empty
    assert [row["pseudo_labels"] for row in rows] == ["0", "0"]
    assert len(read_csv(folder / "iteration_01" / "scores.csv")) == 1
    assert [row["group"] for row in read_csv(folder / "iteration_01" / "queries.csv")] == ["random"]
    assert_figures_are_drawn(folder / "iteration_01")


@pytest.mark.slow
def test_numbers_that_are_too_large_mean_all(run):
    """2**31 - 1 iterations, images in a batch and pseudo-labels."""
    large = ["--iterations", "--batch-size", "--pseudo-first", "--pseudo-step"]
    folder = run("--pool", "8", *itertools.chain(*((option, 2**31 - 1) for option in large)))
    rows = read_csv(folder / "history.csv")
    assert [int(row["annotations"]) for row in rows] == [4, 8, 12]
    assert [int(row["pseudo_labels"]) for row in rows] == [0, 4, 0]  # all images that were not queried


def not_finite(truth, prediction):
    return tf.reduce_mean(prediction) * np.nan


def test_a_training_that_diverges_says_so_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "dice", not_finite)
    with pytest.raises(UserError, match="--learning-rate 1e-05 and --active-learning-rate 0: the training diverged"):
        run()
    assert not list((tmp_path / "r").glob("*iteration*"))


def test_a_network_that_overflows_is_reported_as_diverged(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_unet", constant_unet(np.nan))
    monkeypatch.setattr(Trainer, "fit", lambda *_: None)
    with pytest.raises(UserError, match="--learning-rate 1e-05 and --active-learning-rate 0: the training diverged"):
        run()
    assert not list((tmp_path / "r").glob("*iteration*"))


SHORT_OF_MEMORY = [
    tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[32,64,192,240]"),
    tf.errors.InternalError(None, None, "Failed to allocate 2.1GiB: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    MemoryError("Unable to allocate 3.52 GiB for an array"),
]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.slow
@pytest.mark.parametrize("error", SHORT_OF_MEMORY)
def test_too_little_memory_in_training_is_one_sentence_and_the_run_goes_on(run, tmp_path, monkeypatch, capsys, error):
    """The advice keeps the run's answers: it never names another --run."""
    with monkeypatch.context() as patch, pytest.raises(UserError) as refusal:
        patch.setattr(trainer, "training_step", lambda *_: failing(error))
        run()
    command = f"python train.py --run {tmp_path / 'r'} --batch-size 2"
    assert str(refusal.value).endswith(f"--batch-size 4 is too large for this machine; go on with: {command}")
    assert not list((tmp_path / "r").glob("*iteration*"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", command.split()[1:])
    train.main()
    assert "from now on --batch-size 2, not 4: an unfinished training starts again" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "r" / "history.csv")) == 2


def test_a_batch_of_one_image_cannot_be_smaller(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "training_step", lambda *_: failing(SHORT_OF_MEMORY[0]))
    with pytest.raises(UserError) as refusal:
        run("--batch-size", "1")
    assert str(refusal.value).endswith(f"a machine with more, and go on with: python train.py --run {tmp_path / 'r'}")


@pytest.mark.slow
@pytest.mark.parametrize("error", SHORT_OF_MEMORY)
def test_too_little_memory_in_scoring_is_not_blamed_on_the_batch_size(run, tmp_path, monkeypatch, error):
    monkeypatch.setattr(trainer, "mc_dropout", failing(error))
    with pytest.raises(UserError, match="there is not enough memory; end other programs that use memory") as refusal:
        run()
    assert "batch-size" not in str(refusal.value)
    assert "--run" not in str(refusal.value)
    assert (tmp_path / "r" / "iteration_00").is_dir()


def test_too_little_memory_in_prediction_is_one_sentence(unet_weights, tmp_path, monkeypatch):
    Image.fromarray(np.full((30, 40), 99, np.uint8)).save(tmp_path / "one.png")
    monkeypatch.setattr(predict, "predict_all", failing(SHORT_OF_MEMORY[0]))
    monkeypatch.setattr("sys.argv", ["predict.py", str(tmp_path / "one.png"), "--weights", str(unet_weights)])
    with pytest.raises(UserError, match="there is not enough memory; end other programs that use memory"):
        predict.main()


@pytest.mark.parametrize(("logit", "value", "grey"), [(-25, 0, 0), (0, 0, 0), (25, 255, 0)])
def test_predictions_that_are_empty_or_full_are_masks(tmp_path, monkeypatch, capsys, logit, value, grey):
    save_unet(constant_unet(logit)(32, 32, filters=1), tmp_path / "x.weights.h5", [128.0], [50.0])
    Image.fromarray(np.full((30, 40), 99, np.uint8)).save(tmp_path / "one.png")
    options = ["--weights", tmp_path / "x.weights.h5", "--out", tmp_path / "out", "--uncertainty", "--overlay"]
    monkeypatch.setattr("sys.argv", list(map(str, ["predict.py", tmp_path / "one.png", *options])))
    assert predict.main() == 0
    for name, level in ("one_segmentation", value), ("uncertainty/one_uncertainty", grey), ("overlay/one_overlay", 99):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.size == (40, 30)
            assert set(np.unique(picture)) == {level}
    (row,) = read_csv(tmp_path / "out" / "uncertainty" / "scores.csv")
    assert (row["name"], row["uncertainty"]) == ("one", "0.0")
    assert 0 <= float(row["agreement"]) <= 1
