"""The folds by origin, and folds.py, which trains on all of them but one."""

import importlib.util
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from data import NEAR_DUPLICATES, split
from pictures import find_pairs
from utils import read_csv

FOLDS = ROOT / "results" / "folds"
COUNTS = {"circles": 220, "slides": 155, "ticks": 418, "bar": 682, "stickers": 125}


@pytest.fixture(scope="module")
def fold_of():
    """The rule of results/folds/origins.py: a function from an id to its fold."""
    spec = importlib.util.spec_from_file_location("origins", FOLDS / "origins.py")
    origins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(origins)
    return origins.fold_of


@pytest.fixture(scope="module")
def folds():
    """The committed file: a dict of id to fold."""
    rows = read_csv(FOLDS / "folds.csv")
    found = {row["id"]: row["fold"] for row in rows}
    assert len(found) == len(rows)  # no id twice
    return found


def test_the_folds_are_the_labelled_images_and_never_test_images(folds, fold_of):
    assert Counter(folds.values()) == COUNTS
    assert folds == {id: fold_of(id) for id in folds}
    tested = {row["id"] for row in read_csv(ROOT / "results" / "best" / "test.csv")}
    assert len(tested) == 400
    assert not tested & folds.keys()


def test_near_duplicates_are_in_one_fold(folds):
    assert all(folds.get(first) == folds.get(second) for first, second in NEAR_DUPLICATES)


@pytest.mark.skipif("ISIC2017_DIR" not in os.environ, reason="ISIC2017_DIR does not name the challenge's folders")
def test_the_folds_cover_the_default_split_of_the_real_images(folds):
    pairs, _ = find_pairs(os.environ["ISIC2017_DIR"])
    ids, part = np.array([pair.id for pair in pairs]), np.array([pair.part for pair in pairs])
    dataset = SimpleNamespace(path="isic2017", ids=ids, part=part, has_mask=np.full(len(ids), True))
    parts = split(dataset)
    assert set(ids[np.concatenate([parts.initial, parts.pool])]) == folds.keys()
    assert not set(ids[parts.test]) & folds.keys()
