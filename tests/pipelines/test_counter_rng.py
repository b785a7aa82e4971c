from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipelines.counter_rng import (
    KEY_SHUFFLE_STREAM,
    ORDER_STREAM,
    crop_stream,
    permutation,
    philox4x32,
    photometry_stream,
    random_words,
    uniform,
)

LAST_SEED = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = np.array([int(word, 16) for word in counter.split()], dtype=np.uint64)
    first, second = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox4x32(words, (first, second))] == expected.split()


def test_words_are_the_counter_index_epoch_stream_block_under_the_seed() -> None:
    seed, epoch, stream = 0x299F31D0_A4093822, 9, 5
    words = random_words(seed, epoch, np.array([3, 2**32 - 1]), stream, 8)
    for row, index in enumerate((3, 2**32 - 1)):
        for block in range(2):
            counter = np.array([index, epoch, stream, block], dtype=np.uint64)
            expected = philox4x32(counter, (0xA4093822, 0x299F31D0))
            assert words[row, 4 * block : 4 * block + 4].tolist() == expected.tolist()


def test_values_are_the_same_for_ever() -> None:
    assert uniform(0, 0, np.array([0, 1]), crop_stream(1), 5).tolist() == [
        [0.3569794171489775, 0.25036009564064443, 0.32251715869642794, 0.6679864744655788, 0.8281237396877259],
        [0.6977397280279547, 0.7557338732294738, 0.775399781530723, 0.826373970368877, 0.031621035654097795],
    ]
    assert random_words(LAST_SEED, 7, np.array([0, 3, 2**32 - 1]), photometry_stream(2), 6).tolist() == [
        [770755900, 1434149402, 2958201497, 3309838002, 1736202951, 2757968316],
        [1620027082, 3897315825, 2193436214, 1154199500, 54578009, 2331580641],
        [3138670203, 2284436577, 3870981464, 1419164812, 3426790367, 1881955197],
    ]
    assert permutation(0, 0, 12, ORDER_STREAM).tolist() == [2, 8, 0, 5, 9, 11, 7, 6, 3, 10, 4, 1]
    assert permutation(5, 3, 12, KEY_SHUFFLE_STREAM).tolist() == [6, 8, 7, 2, 4, 3, 1, 0, 9, 11, 10, 5]


def test_a_draw_depends_on_its_own_coordinates_only() -> None:
    many = np.arange(20_001)
    assert (random_words(3, 2, many, 16, 5)[20_000] == random_words(3, 2, many[20_000:], 16, 5)[0]).all()
    indices = np.array([7, 0, 7, 123_456, 2**32 - 1])
    whole = uniform(3, 2, indices, 16, 40)
    assert whole.shape == (5, 40)
    assert whole.dtype == np.float64
    for num_draws in (1, 3, 4, 5, 39):
        assert np.array_equal(uniform(3, 2, indices, 16, num_draws), whole[:, :num_draws])
    for row, index in enumerate(indices):
        assert np.array_equal(uniform(3, 2, np.array([index]), 16, 40)[0], whole[row])
    assert np.array_equal(uniform(3, 2, indices[::-1].copy(), 16, 40), whole[::-1])
    assert uniform(3, 2, indices[:0], 16, 40).shape == (0, 40)


@pytest.mark.parametrize("seed", [0, 1, 2**32, LAST_SEED])
def test_uniform_in_every_direction(seed: int) -> None:
    along_indices = uniform(seed, 1, np.arange(20_000), 17, 3)
    along_draws = uniform(seed, 0, np.array([5]), 16, 20_000)
    along_epochs = np.stack([uniform(seed, epoch, np.array([5]), 16, 2)[0] for epoch in range(3_000)])
    for sample in (*along_indices.T, along_draws[0], *along_epochs.T):
        assert sample.min() >= 0
        assert sample.max() < 1
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
    lanes = stats.spearmanr(along_indices).statistic[np.triu_indices(3, 1)]
    neighbours = stats.spearmanr(along_indices[1:, 0], along_indices[:-1, 0]).statistic
    assert np.abs([*lanes, neighbours]).max() < 4 / np.sqrt(20_000)


def test_streams_seeds_epochs_and_indices_never_collide() -> None:
    views = range(50)
    streams = [ORDER_STREAM, KEY_SHUFFLE_STREAM, *map(crop_stream, views), *map(photometry_stream, views)]
    assert len(set(streams)) == len(streams)
    blocks = [
        random_words(seed, epoch, np.arange(100), stream, 8).reshape(-1, 4)
        for seed in (0, 1, 2**32)
        for epoch in range(3)
        for stream in streams[:12]
    ]
    together = np.concatenate(blocks)
    assert len(np.unique(together, axis=0)) == len(together)


@pytest.mark.parametrize("length", [0, 1, 2, 17, 1000])
def test_permutation_is_one(length: int) -> None:
    order = permutation(0, 0, length, ORDER_STREAM)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(length))


def test_every_place_is_equally_likely() -> None:
    orders = np.stack([permutation(0, epoch, 6, ORDER_STREAM) for epoch in range(3_000)])
    for place in range(6):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=6)).pvalue > 1e-3
    for left, right in ((0, 1), (2, 5)):  # an even number of inversions would show in the order of two places
        assert stats.binomtest(int((orders[:, left] < orders[:, right]).sum()), 3_000).pvalue > 1e-3


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed} is not allowed: give an integer from 0 to 2\*\*64 - 1"):
        uniform(seed, 0, np.arange(3), 16, 4)
    with pytest.raises(ValueError, match=f"seed {seed} is not allowed"):
        permutation(seed, 0, 3, ORDER_STREAM)
