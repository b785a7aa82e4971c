"""Class-balanced order and subsets: the same for ever, on every machine, for a given seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.sources.split import Split

GOLDEN = 0x9E3779B97F4A7C15


def class_balanced_order(rank: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A permutation, int64 [N], of which every prefix is as class-balanced as its classes allow.

    Round robin over the classes (-1, unlabelled, is one of them): in each round every class that is not used
    up gives one sample, by a seeded shuffle; the order of the classes in a round is shuffled, too. Any two
    prefixes are nested. `rank`: the samples' `rank_in_class` by this seed.
    """
    return _sorted_by(rank, _hash(seed, len(rank), stream=1))


def shuffled_order(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of [0, count), int64; the same for ever for a seed (any integer, taken modulo 2^64)."""
    return np.argsort(_hash(seed, count, stream=2), kind="stable").astype(np.int64, copy=False)


def limited(split: Split, max_images: int | None) -> Split:
    """`split`, or a class-balanced choice of `max_images` (at least 1) of it, by seed 0."""
    if max_images is None or max_images >= len(split):
        return split
    return split.subset(np.sort(class_balanced_order(rank_in_class(split.labels, 0), 0)[:max_images]))


def rank_in_class(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """int64 [N]: the place, from 0, of each sample in the shuffle of its class by any integer, taken modulo 2^64."""
    return rank_by(_hash(seed, len(labels), stream=0), labels)


def rank_by(draws: NDArray[np.uint64], labels: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [N]: the place, from 0, of each sample among those of its class, sorted by `draws` [N]."""
    by_class = _sorted_by(labels, draws)
    sizes = np.unique(labels, return_counts=True)[1]
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def _sorted_by(groups: NDArray[Any], draws: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`np.lexsort((draws, groups))`, int64 [N]; many times as fast where there are few groups, which 16 bits count."""
    order = np.argsort(draws, kind="stable")
    if groups.size and groups.min() >= -(1 << 15) and groups.max() < 1 << 15:
        groups = groups.astype(np.int16)
    return order[np.argsort(groups[order], kind="stable")].astype(np.int64, copy=False)


def _hash(seed: int, count: int, stream: int) -> NDArray[np.uint64]:
    """uint64 [count]: the SplitMix64 sequence from a state made of (seed, stream). All values differ.

    (Steele, Lea and Flood 2014.) Written out, since numpy's Generator may change its streams between
    versions.
    """
    state = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream))
    return _mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
