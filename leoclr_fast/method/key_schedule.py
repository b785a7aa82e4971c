"""Which rank encodes which key view of a step, and in which order: where the shuffle of the keys is decided.

A step's keys have numbers: view * B + image, with B images in the global batch. Every rank knows the whole schedule,
since it follows from the seed and the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leoclr_fast.config import MethodConfig
from leoclr_fast.distributed.batch_layout import BatchLayout, Indices
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


class KeySchedule:
    """The passes of the key encoder over a global batch, for batches of one size.

    Each micro-batch has one pass for each key view, or one for all of them, as `key_passes` says. With a
    `key_batchnorm` of shuffle, a permutation of a pass's views over all ranks says who encodes which; otherwise each
    rank encodes its own, in a random order if they are split into groups.
    """

    def __init__(self, config: MethodConfig, layout: BatchLayout, num_keys: int) -> None:
        self.layout = layout
        self.num_keys = num_keys
        self._views_a_pass = num_keys if config.key_passes == "joint" else 1
        self.exchanges = config.key_batchnorm == "shuffle" and layout.world_size > 1
        self._shuffles = config.key_batchnorm in ("shuffle", "split")
        sizes = [self._sizes(rank) for rank in range(layout.world_size)]
        self.pass_sizes: list[int] = sizes[layout.rank]
        """How many key views this rank encodes in each pass."""
        self.largest = max(map(sum, sizes))
        """How many key views the rank that encodes the most of them has in a step."""

    def draw(self, seed: int, step: int) -> KeyOrder:
        """The schedule of a step: a pure function of (seed, step), the same on every rank."""
        layout, rank, batch_size = self.layout, self.layout.rank, self.layout.batch_size
        encoded = self._encoded(seed, step)
        images, views = encoded[rank] % batch_size, encoded[rank] // batch_size
        if self.exchanges:
            owners = [layout.owners[keys % batch_size] for keys in encoded]
            place = np.empty(len(images), dtype=np.int64)
            place[np.argsort(owners[rank], kind="stable")] = np.arange(len(images))
            receive_sizes = np.bincount(owners[rank], minlength=layout.world_size).tolist()
            sent = [keys[owner == rank] for keys, owner in zip(encoded, owners, strict=True)]
            send_sizes = [len(keys) for keys in sent]
            keys = np.concatenate(sent)
            images, views = keys % batch_size, keys // batch_size
        else:
            place = np.arange(len(images))
            send_sizes = receive_sizes = [len(images) * (other == rank) for other in range(layout.world_size)]
        restore = np.empty(self.num_keys * batch_size, dtype=np.int64)
        for other, keys in enumerate(encoded):
            restore[keys] = other * self.largest + np.arange(len(keys))
        return KeyOrder(
            encoded=encoded,
            sent_rows=layout.rows[images],
            sent_views=views,
            send_sizes=send_sizes,
            receive_sizes=receive_sizes,
            place=place,
            restore=restore,
        )

    def _sizes(self, rank: int) -> list[int]:
        """How many key views a rank encodes in each pass."""
        layout, num_passes = self.layout, self.num_keys // self._views_a_pass
        sizes = []
        for part, share in zip(layout.parts, layout.shares(rank), strict=True):
            if self.exchanges:
                share = rank_slice(self._views_a_pass * (part.stop - part.start), rank, layout.world_size)
                size = share.stop - share.start
            else:
                size = self._views_a_pass * (share.stop - share.start)
            sizes += num_passes * [size]
        return sizes

    def _encoded(self, seed: int, step: int) -> list[Indices]:
        """The numbers of the keys that each rank encodes, pass by pass."""
        layout = self.layout
        encoded: list[list[Indices]] = [[] for _ in range(layout.world_size)]
        for number, part in enumerate(layout.parts):
            shares = [layout.shares(rank)[number] for rank in range(layout.world_size)]
            for pass_number, first_view in enumerate(range(0, self.num_keys, self._views_a_pass)):
                views = range(first_view, first_view + self._views_a_pass)
                # Steps of one micro-batch draw as they did before there were micro-batches.
                draw, stream = step * layout.micro_batches + number, KEY_SHUFFLE_STREAM + pass_number
                if self.exchanges:
                    keys = self._numbers(views, part)
                    keys = keys[permutation(seed, draw, len(keys), stream)]
                    for rank, list_ in enumerate(encoded):
                        list_.append(keys[rank_slice(len(keys), rank, layout.world_size)])
                    continue
                orders: dict[int, Indices] = {}
                for share, list_ in zip(shares, encoded, strict=True):
                    keys = self._numbers(views, share)
                    if self._shuffles:
                        if len(keys) not in orders:
                            orders[len(keys)] = permutation(seed, draw, len(keys), stream)
                        keys = keys[orders[len(keys)]]
                    list_.append(keys)
        return [np.concatenate(keys) for keys in encoded]

    def _numbers(self, views: range, images: slice) -> Indices:
        """The numbers of the keys of these views of these images, view by view."""
        return np.concatenate([view * self.layout.batch_size + np.arange(images.start, images.stop) for view in views])
