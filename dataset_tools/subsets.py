"""Class-balanced order and subsets: the same for ever, on every machine, for a given seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataset_tools.sources.split import Split

GOLDEN = 0x9E3779B97F4A7C15


def class_balanced_order(labels: ArrayLike, seed: int) -> NDArray[np.int64]:
    """A permutation, int64 [N], of which every prefix is as class-balanced as its classes allow.

    Round robin over the classes (-1, unlabelled, is one of them): in each round every class that is not used
    up gives one sample, by a seeded shuffle; the order of the classes in a round is shuffled, too. Any two
    prefixes are nested. `labels`: integers [N]. `seed`: any integer, taken modulo 2^64. Raises ValueError if
    labels are anything else.
    """
    return round_robin(rank_in_class(labels, seed), seed)


def round_robin(rank: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """`class_balanced_order` of samples whose `rank_in_class` by this seed is known."""
    return _sorted_by(rank, _hash(seed, len(rank), stream=1))


def class_balanced_subset(labels: ArrayLike, count: int, seed: int) -> NDArray[np.int64]:
    """The first `count` of class_balanced_order, sorted: int64 [count]. Raises ValueError unless 0 <= count
    <= N.
    """
    order = class_balanced_order(labels, seed)
    if not 0 <= count <= len(order):
        raise ValueError(f"cannot take {count} of {len(order)} samples; give a count from 0 to {len(order)}")
    return np.sort(order[:count])


def shuffled_order(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of [0, count), int64; the same for ever for a seed (any integer, taken modulo 2^64)."""
    return np.argsort(_hash(seed, count, stream=2), kind="stable").astype(np.int64, copy=False)


def limited(split: Split, max_images: int | None) -> Split:
    """`split`, or a class-balanced choice of `max_images` of it (seed 0). Raises ValueError if that is below 1."""
    if max_images is not None and max_images < 1:
        raise ValueError(f"--max-images {max_images} is not allowed: give at least 1")
    if max_images is None or max_images >= len(split):
        return split
    return split.subset(class_balanced_subset(split.labels, max_images, seed=0))


def rank_in_class(labels: ArrayLike, seed: int) -> NDArray[np.int64]:
    """int64 [N]: the place, from 0, of each sample in the seeded shuffle of its class."""
    given = np.asarray(labels)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"labels must be integers in one dimension, not {given.dtype} of shape {given.shape}")
    return rank_by(_hash(seed, len(given), stream=0), given)


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
