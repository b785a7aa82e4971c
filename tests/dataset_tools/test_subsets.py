from __future__ import annotations

import numpy as np
import pytest

from dataset_tools.subsets import _hash, _mix, class_balanced_order, class_balanced_subset, rank_by

UNEVEN = [0, 0, 0, 0, 1, 1, 2, 2, 2, -1]


def test_hash_is_splitmix64() -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)  # the published sequence of seed 1234567
    sequence = _mix(np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * golden)
    assert sequence.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _hash(0, 3, stream=0).tolist() == [16294208416658607535, 7960286522194355700, 487617019471545679]


@pytest.mark.parametrize(
    ("seed", "order"),
    [
        (0, [4, 2, 6, 9, 8, 1, 5, 7, 0, 3]),
        (1, [9, 1, 8, 5, 6, 0, 4, 7, 2, 3]),
        (-1, [5, 9, 0, 6, 4, 2, 8, 7, 1, 3]),
        (2**64 - 1, [5, 9, 0, 6, 4, 2, 8, 7, 1, 3]),
    ],
)
def test_order_is_the_same_for_ever(seed: int, order: list[int]) -> None:
    assert class_balanced_order(UNEVEN, seed).tolist() == order


def test_every_prefix_is_as_balanced_as_possible() -> None:
    labels = np.array([0] * 5 + [1] * 17 + [2] * 9 + [-1] * 3)
    order = class_balanced_order(labels, seed=3)
    assert sorted(order) == list(range(34))
    totals = {label: int((labels == label).sum()) for label in (-1, 0, 1, 2)}
    for count in range(35):
        taken = {label: int((labels[order[:count]] == label).sum()) for label in totals}
        unfinished = [taken[label] for label in totals if taken[label] < totals[label]]
        assert not unfinished or max(taken.values()) - min(unfinished) <= 1


def test_subsets_are_nested_sorted_and_typed() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 500)
    smaller: set[int] = set()
    for count in (0, 5, 50, 499, 500):
        subset = class_balanced_subset(labels, count, seed=1)
        assert subset.dtype == np.int64
        assert subset.tolist() == sorted(set(subset.tolist()))
        assert len(subset) == count
        assert smaller <= set(subset.tolist())
        smaller = set(subset.tolist())


@pytest.mark.parametrize("factor", [1, 1000, -(10**12)])
def test_classes_may_be_any_numbers(factor: int) -> None:
    labels = np.random.default_rng(0).integers(0, 50, 3000) * factor
    draws = _hash(5, 3000, stream=0)
    assert rank_by(draws, labels).tolist() == [
        int(((labels == label) & (draws < draw)).sum()) for label, draw in zip(labels, draws, strict=True)
    ]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="cannot take 11 of 10 samples"):
        class_balanced_subset(UNEVEN, 11, 0)
    with pytest.raises(ValueError, match="cannot take -1"):
        class_balanced_subset(UNEVEN, -1, 0)
    with pytest.raises(ValueError, match="labels must be integers"):
        class_balanced_order([0.5, 1.0], 0)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        class_balanced_order([[0, 1]], 0)
    assert class_balanced_order([], 0).tolist() == []
