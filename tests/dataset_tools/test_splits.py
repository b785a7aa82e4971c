from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset_tools.sources import ImageSource, Split
from dataset_tools.splits import choose_splits
from tests.dataset_tools.made_up import NamedSplit


def source(**labels: list[int]) -> ImageSource:
    splits: dict[str, Split] = {
        name: NamedSplit([f"{name}/{index}" for index in range(len(values))], values, ("a", "b", "c"), name)
        for name, values in labels.items()
    }
    return ImageSource(path=Path("made/up"), kind="made up", splits=splits, classes=("a", "b", "c"))


def test_val_goes_before_test() -> None:
    data = source(train=[0, 1], val=[1], test=[0, 0])
    chosen = choose_splits(data)
    assert chosen.pretrain is chosen.bank is data.splits["train"]
    assert chosen.queries is data.splits["val"]
    assert chosen.note == ""
    data = source(train=[0, 1], test=[0, 0])
    assert choose_splits(data).queries is data.splits["test"]
    data = source(train=[0, 1], val=[-1], test=[0, 0])
    assert choose_splits(data).queries is data.splits["test"]


def test_unlabeled_is_what_pretraining_takes() -> None:
    data = source(train=[0, 1], test=[0], unlabeled=[-1] * 5)
    chosen = choose_splits(data)
    assert chosen.pretrain is data.splits["unlabeled"]
    assert chosen.bank is data.splits["train"]
    assert chosen.queries is data.splits["test"]


def test_a_tenth_is_held_out_of_pretraining_and_bank() -> None:
    data = source(train=[0, 1, 2] * 100)
    chosen = choose_splits(data, holdout_seed=5)
    assert chosen.bank is not None
    assert chosen.queries is not None
    assert chosen.pretrain is chosen.bank
    assert np.bincount(chosen.queries.labels).tolist() == [10, 10, 10]
    assert len(chosen.bank) == 270
    assert sorted([*chosen.bank.names, *chosen.queries.names]) == sorted(data.splits["train"].names)
    assert chosen.queries.read(0) == chosen.queries.names[0].encode()
    assert chosen.note == (
        "made/up has no labelled val or test split: 30 of its 300 train images (class-balanced, seed 5) are held out "
        "of pretraining and are kNN's queries."
    )
    again, other = choose_splits(data, holdout_seed=5), choose_splits(data, holdout_seed=6)
    assert again.queries is not None
    assert other.queries is not None
    assert list(again.queries.names) == list(chosen.queries.names) != list(other.queries.names)


def test_at_most_half_of_a_rare_class_is_held_out() -> None:
    chosen = choose_splits(source(train=[0] * 200 + [1] * 4 + [2]))
    assert chosen.queries is not None
    assert chosen.bank is not None
    assert np.bincount(chosen.queries.labels, minlength=3).tolist() == [18, 2, 0]
    assert np.bincount(chosen.bank.labels).tolist() == [182, 2, 1]


@pytest.mark.parametrize("data", [source(train=[-1] * 30), source(unlabeled=[-1] * 3), source(train=[-1], val=[0, 1])])
def test_without_labels_nothing_is_evaluated(data: ImageSource) -> None:
    chosen = choose_splits(data)
    assert chosen.bank is chosen.queries is None
    assert len(chosen.pretrain) == len(next(reversed(data.splits.values()))) or "val" in data.splits
    assert chosen.note == "made/up has no labelled train images, so no kNN accuracy is computed."


def test_classes_of_one_image_cannot_be_split() -> None:
    chosen = choose_splits(source(train=[0, 1, 2]))
    assert chosen.bank is chosen.queries is None
    assert chosen.note == "made/up has no class of two images or more, so no kNN accuracy is computed."


def test_nothing_to_pretrain_on() -> None:
    with pytest.raises(ValueError, match="neither a train nor an unlabeled split"):
        choose_splits(source(test=[0, 1]))
