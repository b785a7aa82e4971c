from __future__ import annotations

import pickle

import numpy as np
import pytest

from dataset_tools.packed_names import PackedNames

NAMES = ["train/cat/1.jpg", "", "ü ö/…\n.png", "broken \udcff byte.jpg", "z"]


def test_behaves_like_a_list_of_str() -> None:
    packed = PackedNames(iter(NAMES))
    assert list(packed) == NAMES
    assert [packed[i] for i in range(-5, 5)] == [NAMES[i] for i in range(-5, 5)]
    assert len(packed) == 5
    assert packed[1:4:2] == PackedNames(NAMES[1:4:2])
    assert list(packed[::-1]) == NAMES[::-1]
    assert "z" in packed
    assert "y" not in packed
    with pytest.raises(IndexError):
        packed[5]


def test_select_pickle_and_equality() -> None:
    packed = PackedNames(NAMES)
    assert list(packed.select(np.array([4, 0, 0]))) == ["z", NAMES[0], NAMES[0]]
    assert len(packed.select(np.array([], dtype=np.int64))) == 0
    many = PackedNames(str(number) for number in range(40_000))
    chosen = np.random.default_rng(0).integers(0, 40_000, 50_000)
    assert list(many.select(chosen)) == [str(number) for number in chosen.tolist()]
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert packed != PackedNames([*NAMES[:-1], "y"])
    assert PackedNames(["ab", "c"]) != PackedNames(["a", "bc"])
    assert list(PackedNames()) == []


def test_buffers_must_fit() -> None:
    packed = PackedNames(NAMES)
    assert PackedNames.from_buffers(packed.blob, packed.offsets) == packed
    for offsets in ([0, 3], [1, len(packed.blob)], [0, 5, 2, len(packed.blob)], []):
        with pytest.raises(ValueError, match="do not describe a blob"):
            PackedNames.from_buffers(packed.blob, np.array(offsets, dtype=np.int64))
