"""Which rank encodes which key view of a step, and in which order: where the shuffle of the keys is decided.

A step's keys have numbers: view * B + image, with B images in the global batch. Every rank knows the whole schedule,
since it follows from the seed and the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from leoclr_fast.config import MethodConfig
from leoclr_fast.distributed.batch_layout import BatchLayout, Indices
from leoclr_fast.method.split_batchnorm import group_sizes
from pipelines.counter_rng import KEY_SHUFFLE_STREAM, permutation
from pipelines.order import rank_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOrder:
    """The schedule of one step, as this rank needs it. All are int64 on the host, N keys encoded here."""

    encoded: list[Indices]
    """The numbers of the keys that each rank encodes, in its order."""
    sent_rows: Indices
    """[M]: of the key views that this rank hands out, to rank 0 first, the image's row here."""
    sent_views: Indices
    """[M]: and which key view of it."""
    send_sizes: list[int]
    """How many of them go to each rank."""
    receive_sizes: list[int]
    """How many key views come from each rank."""
    place: Indices
    """[N]: where the views to be encoded lie among those that came, from rank 0 first."""
    restore: Indices
    """[P * B]: the row of each key, by its number, among the rows of all ranks: `KeySchedule.largest` from each."""


class _Pool(NamedTuple):
    """Images whose keys are permuted together, and dealt out to passes of the ranks."""

    images: list[slice]
    """Of the global batch."""
    passes: list[tuple[int, int]]
    """(rank, number of keys) of each pass, in order."""
    groups: list[tuple[int, int]]
    """(start, stop), among all keys in order, of those that one batch-norm normalises together."""


class KeySchedule:
    """The passes of the key encoder over a global batch, for batches of one size.

    Each micro-batch has one pass for each key view, or one for all of them, as `key_passes` says. Every key is made
    before the first query. So a `key_batchnorm` of shuffle permutes the views of the whole global batch over ranks and
    micro-batches, and split those of a rank's share of it, so that no batch-norm of the key encoder has exactly the
    images of a query's; `leak` says where that is impossible, or not tried.
    """

    def __init__(self, config: MethodConfig, layout: BatchLayout, num_keys: int) -> None:
        self.config = config
        self.layout = layout
        self.num_keys = num_keys
        self._views_a_pass = num_keys if config.key_passes == "joint" else 1
        self.exchanges = config.key_batchnorm == "shuffle" and layout.world_size > 1
        self._shuffles = config.key_batchnorm in ("shuffle", "split")
        self._shares = [layout.shares(rank) for rank in range(layout.world_size)]
        self._query_groups = {(group.start, group.stop) for group in self.query_groups()}
        self._pools = self._make_pools()
        sizes: list[list[int]] = [[] for _ in self._shares]
        for rank, size in (one for pool in self._pools for one in pool.passes):
            sizes[rank].append(size)
        num_rounds = num_keys // self._views_a_pass
        self.pass_sizes: list[int] = num_rounds * sizes[layout.rank]
        """How many key views this rank encodes in each pass: of one key's micro-batches, then of the next key's."""
        self.largest = num_rounds * max(map(sum, sizes))
        """How many key views the rank that encodes the most of them has in a step."""

    def draw(self, seed: int, step: int) -> KeyOrder:
        """The schedule of a step: a pure function of (seed, step), the same on every rank."""
        layout, rank, batch_size = self.layout, self.layout.rank, self.layout.batch_size
        encoded = self._encoded(seed, step)
        owners = [layout.owners[keys % batch_size] for keys in encoded]
        place = np.empty(len(encoded[rank]), dtype=np.int64)
        place[np.argsort(owners[rank], kind="stable")] = np.arange(len(place))
        parts = [keys[owner == rank] for keys, owner in zip(encoded, owners, strict=True)]
        sent = np.concatenate(parts)
        restore = np.empty(self.num_keys * batch_size, dtype=np.int64)
        for other, keys in enumerate(encoded):
            restore[keys] = other * self.largest + np.arange(len(keys))
        return KeyOrder(
            encoded=encoded,
            sent_rows=layout.rows[sent % batch_size],
            sent_views=sent // batch_size,
            send_sizes=[len(keys) for keys in parts],
            receive_sizes=np.bincount(owners[rank], minlength=layout.world_size).tolist(),
            place=place,
            restore=restore,
        )

    def query_groups(self) -> list[slice]:
        """The images whose queries one batch-norm normalises together, as slices of the global batch."""
        mode = self.config.query_batchnorm
        if mode == "sync":
            return self.layout.parts
        shares = [share for own in self._shares for share in own]
        if mode == "plain":
            return shares
        sizes = [group_sizes(share.stop - share.start, self.config.query_batchnorm_group) for share in shares]
        return [
            slice(share.start + start, share.start + stop)
            for share, own in zip(shares, sizes, strict=True)
            for start, stop in _bounds(own)
        ]

    def leak(self) -> str | None:
        """How a query could recognise its key by batch statistics that both share; None if it cannot."""
        if self._shuffles:
            if any(len(pool.groups) < 2 for pool in self._pools):
                return "all keys are in one group"
            if all(self._separate(self._numbers(pool, 0), pool.groups) for pool in self._pools):
                return None
            return "in every order a group of keys has exactly the images of a query's batch-norm"
        shares = [share for own in self._shares for share in own]
        groups = {"plain": shares, "sync": self.layout.parts}.get(self.config.key_batchnorm, [])
        same = sum((group.start, group.stop) in self._query_groups for group in groups)
        return (
            f"{same} of {len(groups)} groups of keys have exactly the images of a query's batch-norm" if same else None
        )

    def _make_pools(self) -> list[_Pool]:
        """The whole batch (shuffle), each rank's share of it (split), or each rank's share of a micro-batch."""
        layout, mode = self.layout, self.config.key_batchnorm
        ranks, parts = range(layout.world_size), range(layout.micro_batches)
        if mode == "shuffle":
            shared = [
                (rank, rank_slice(self._views_a_pass * (part.stop - part.start), rank, layout.world_size))
                for part in layout.parts
                for rank in ranks
            ]
            pools = [([slice(0, layout.batch_size)], [(rank, part.stop - part.start) for rank, part in shared])]
        else:
            together = [list(parts)] if mode == "split" else [[part] for part in parts]
            pools = []
            for rank in ranks:
                for numbers in together:
                    images = [self._shares[rank][number] for number in numbers]
                    sizes = [self._views_a_pass * (own.stop - own.start) for own in images]
                    pools.append((images, [(rank, size) for size in sizes]))
        group = self.config.key_batchnorm_group if self._shuffles else self.num_keys * layout.batch_size
        return [
            _Pool(images, passes, _bounds([size for _, views in passes for size in group_sizes(views, group)]))
            for images, passes in pools
        ]

    def _encoded(self, seed: int, step: int) -> list[Indices]:
        """The numbers of the keys that each rank encodes, pass by pass."""
        encoded: list[list[Indices]] = [[] for _ in self._shares]
        for number, first_view in enumerate(range(0, self.num_keys, self._views_a_pass)):
            orders: dict[int, Indices] = {}
            for pool in self._pools:
                keys = self._numbers(pool, first_view)
                if self._shuffles:
                    if len(keys) not in orders:
                        orders[len(keys)] = permutation(seed, step, len(keys), KEY_SHUFFLE_STREAM + number)
                    keys = keys[orders[len(keys)]]
                    self._separate(keys, pool.groups)
                ends = np.cumsum([size for _, size in pool.passes])
                for (rank, _), own in zip(pool.passes, np.split(keys, ends[:-1]), strict=True):
                    encoded[rank].append(own)
        return [np.concatenate(keys) for keys in encoded]

    def _numbers(self, pool: _Pool, first_view: int) -> Indices:
        """The numbers of the keys of a pool, view by view."""
        images = np.concatenate([np.arange(part.start, part.stop) for part in pool.images])
        views = range(first_view, first_view + self._views_a_pass)
        return np.concatenate([view * self.layout.batch_size + images for view in views])

    def _separate(self, keys: Indices, groups: list[tuple[int, int]]) -> bool:
        """Exchange a key of every group that has exactly the images of a query's batch-norm with one of another group.

        Chance hardly makes such a group, unless they are tiny. Returns whether none is left.
        """
        return all(self._is_repaired(keys, group, groups) for group in groups)

    def _is_repaired(self, keys: Indices, group: tuple[int, int], groups: list[tuple[int, int]]) -> bool:
        start, stop = group
        if not self._is_query_group(keys[start:stop]):
            return True
        for other_start, other_stop in groups:
            for place in range(other_start, other_stop) if other_start != start else ():
                keys[[start, place]] = keys[[place, start]]
                if not any(map(self._is_query_group, (keys[start:stop], keys[other_start:other_stop]))):
                    return True
                keys[[start, place]] = keys[[place, start]]
        return False

    def _is_query_group(self, keys: Indices) -> bool:
        images = np.unique(keys % self.layout.batch_size)
        first, last = int(images[0]), int(images[-1])
        return last - first + 1 == len(images) and (first, last + 1) in self._query_groups


def fitting_group(config: MethodConfig, layout: BatchLayout, num_keys: int) -> int:
    """`key_batchnorm_group`, or less where a batch is too small for groups of it that hide what they are to hide."""
    for size in (config.key_batchnorm_group, 16, 8, 4, 2) if config.key_batchnorm in ("shuffle", "split") else ():
        smaller = replace(config, key_batchnorm_group=min(size, config.key_batchnorm_group))
        if KeySchedule(smaller, layout, num_keys).leak() is None:
            return smaller.key_batchnorm_group
    return config.key_batchnorm_group


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of parts that follow one another."""
    return list(pairwise(accumulate(sizes, initial=0)))
