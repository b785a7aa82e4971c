from __future__ import annotations

import numpy as np
import pytest

from dataset_tools.subsets import _hash, _mix, class_balanced_order, rank_by, rank_in_class

UNEVEN = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, -1])


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
    assert class_balanced_order(rank_in_class(UNEVEN, seed), seed).tolist() == order


def test_every_prefix_is_as_balanced_as_possible() -> None:
    labels = np.array([0] * 5 + [1] * 17 + [2] * 9 + [-1] * 3)
    order = class_balanced_order(rank_in_class(labels, 3), seed=3)
    assert sorted(order) == list(range(34))
    totals = {label: int((labels == label).sum()) for label in (-1, 0, 1, 2)}
    for count in range(35):
        taken = {label: int((labels[order[:count]] == label).sum()) for label in totals}
        unfinished = [taken[label] for label in totals if taken[label] < totals[label]]
        assert not unfinished or max(taken.values()) - min(unfinished) <= 1


@pytest.mark.parametrize("factor", [1, 1000, -(10**12)])
def test_classes_may_be_any_numbers(factor: int) -> None:
    labels = np.random.default_rng(0).integers(0, 50, 3000) * factor
    draws = _hash(5, 3000, stream=0)
    assert rank_by(draws, labels).tolist() == [
        int(((labels == label) & (draws < draw)).sum()) for label, draw in zip(labels, draws, strict=True)
    ]
