"""utils.py: metrics against scikit-learn and the challenge's scorer, whole files, order, seeds, errors."""

import errno
import threading

import numpy as np
import pytest
import sklearn.metrics
from isic_challenge_scoring.confusion import create_binary_confusion_matrix
from isic_challenge_scoring.segmentation import metrics as challenge

from utils import (
    UserError,
    derived_seed,
    map_in_order,
    run_command,
    segmentation_metrics,
    whole_file,
    whole_folder,
    write_csv,
)


def random_masks(count=30, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random((count, 12, 10)) < rng.random((count, 1, 1))
    prediction = truth ^ (rng.random(truth.shape) < rng.random((count, 1, 1)) * 0.5)
    prediction[0], truth[1], prediction[1] = False, True, True  # an empty prediction; all lesion
    truth[2], prediction[2] = False, False  # nothing to find and nothing found
    return truth, prediction


def test_metrics_are_those_of_the_challenges_scorer():
    truth, prediction = random_masks()
    ours = segmentation_metrics(truth, prediction)
    for n, pair in enumerate(zip(truth, prediction)):
        confusion = create_binary_confusion_matrix(*pair, name=str(n))
        for name, values in ours.items():
            assert values[n] == pytest.approx(getattr(challenge, f"binary_{name}")(confusion), abs=1e-12), name


def test_metrics_are_those_of_scikit_learn():
    truth, prediction = random_masks(20, seed=1)
    ours = segmentation_metrics(truth.astype(np.uint8), prediction.astype(np.uint8))
    for n in range(3, 20):
        pair = truth[n].ravel(), prediction[n].ravel()
        assert ours["dice"][n] == pytest.approx(sklearn.metrics.f1_score(*pair))
        assert ours["jaccard"][n] == pytest.approx(sklearn.metrics.jaccard_score(*pair))
        assert ours["sensitivity"][n] == pytest.approx(sklearn.metrics.recall_score(*pair))
        assert ours["specificity"][n] == pytest.approx(
            sklearn.metrics.recall_score(*pair, pos_label=False, zero_division=1)
        )
        assert ours["accuracy"][n] == pytest.approx(sklearn.metrics.accuracy_score(*pair))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    write_csv(path, ["a", "b"], [(1, 2)])
    assert path.read_text().split() == ["a,b", "1,2"]
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text().split() == ["a,b", "1,2"]
    assert [p.name for p in path.parent.iterdir()] == ["x.csv"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "iteration_01"
    with pytest.raises(ZeroDivisionError), whole_folder(path) as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".partial-iteration_01").mkdir()  # left by a process that was killed
    (tmp_path / ".partial-iteration_01" / "old").write_text("")
    with whole_folder(path) as partial:
        (partial / "a").write_text("whole")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_01"]
    assert [p.name for p in path.iterdir()] == ["a"]


def test_map_in_order_keeps_the_order_and_bounds_what_is_under_way():
    taken, release = [], threading.Event()

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    def wait(n):
        release.wait(5)
        return -n

    results = map_in_order(wait, items(), workers=3)
    threading.Timer(0.2, release.set).start()
    assert next(results) == 0
    assert len(taken) < 10
    assert list(results) == [-n for n in range(1, 1000)]


def test_an_error_in_a_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda n: 1 / n, [2, 1, 0]))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = [derived_seed(seed, k, what) for seed in (1, 2) for k in range(10) for what in ("queries", "passes")]
    assert len(set(seeds)) == 40
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(1, 2, "queries") == 426_851_214  # never to change: runs are repeated by it


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.jpg: is bad; get another"), 2, "error: a.jpg: is bad; get another\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.h5"),
            2,
            "out.h5 cannot be read or written: No space left",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_an_exit_code(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == code
    stderr = capsys.readouterr().err
    assert said in stderr
    assert stderr.count("\n") == 1


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
