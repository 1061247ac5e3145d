"""events.py: what --tensorboard writes, read back from the event files."""

import io
from collections import defaultdict

import pytest
from conftest import write_blobs
from PIL import Image

import train
from config import read_config
from devices import tf
from utils import UserError, read_csv

SETTINGS = (
    "--filters 4 --initial 8 --pool 20 --test 6 --initial-epochs 3 --active-epochs 1 --batch-size 4 --passes 2 "
    "--no-detection 1 --most-uncertain 1 --random 2 --iterations 2 --tensorboard"
)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a finished run with --tensorboard, and its events: a dict of tag to a dict of step to tensor."""
    folder = tmp_path_factory.mktemp("events")
    data, run = write_blobs(folder / "blobs.h5", 40, 48, 64), folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "--data", str(data), "--run", str(run), *SETTINGS.split()])
        train.main()
    found = defaultdict(dict)
    for path in sorted((run / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[value.tag][event.step] = tf.make_ndarray(value.tensor)
    return run, found


def test_every_step_has_its_loss_and_learning_rate(a_run):
    _, found = a_run
    losses, rates = found["training/loss"], found["training/learning_rate"]
    steps = 3 * 2 + 3 + 4  # 8, 12 and 16 images in batches of 4
    assert sorted(losses) == sorted(rates) == list(range(steps))
    assert all(-1 <= loss <= 0 for loss in losses.values())  # the published loss: less the Dice
    assert all(rate > 0 for rate in rates.values())


def test_every_iteration_has_its_row_of_the_history(a_run):
    run, found = a_run
    for row in read_csv(run / "history.csv"):
        for name in "annotations", "dice", "seconds_training":
            assert found[f"history/{name}"][int(row["iteration"])] == pytest.approx(float(row[name]))


def test_the_histogram_holds_the_scores_of_the_pool(a_run):
    run, found = a_run
    scores = [float(row["uncertainty"]) for row in read_csv(run / "iteration_02" / "scores.csv")]
    bins = found["pool/scores"][2]
    assert bins[:, 2].sum() == len(scores) == 16
    assert (bins[0, 0], bins[-1, 1]) == pytest.approx((min(scores), max(scores)))


def test_four_examples_show_their_masks(a_run):
    _, found = a_run
    pictures = [found[f"examples/{n}"] for n in range(4)]
    assert "examples/4" not in found
    for picture in pictures:
        assert sorted(picture) == [0, 1, 2]
        width, height, png = picture[0].tolist()
        assert Image.open(io.BytesIO(png)).size == (int(width), int(height)) == (128, 96)


@pytest.mark.parametrize("option", ["--final-steps 5 --run {run}", ""])
def test_where_nothing_would_be_written_the_option_is_refused(a_run, option):
    with pytest.raises(UserError, match="--tensorboard"):
        read_config(["--tensorboard", *option.format(run=a_run[0]).split()])
