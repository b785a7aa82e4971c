"""The sum of the gradients over the ranks: in a few buckets, which travel while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from leoclr_fast.distributed.collectives import Ranks

_BUCKET_BYTES = 25 << 20


@dataclass(slots=True)
class _Bucket:
    weights: list[nn.Parameter]
    parts: list[Tensor]
    """Of the buffer, flat, one for each of the weights."""
    flat: Tensor
    num_awaited: int = 0
    """How many gradients are still to be added in this step."""


class GradientBuckets:
    """Gradients as views of buffers that never move, the last layers' first, each summed as soon as it is full.

    Buckets are sent in their order, and filled by one copy each, in the order of storage. Both are the same in every
    step and after every resume. That is why there is no DistributedDataParallel here: from its second step on its
    buckets follow the order in which gradients became ready in the first, so that from 3 ranks on a resumed run would
    differ in the last bits. What keeps it from that (`find_unused_parameters`) walks the graph in every step.
    """

    def __init__(self, weights: Sequence[nn.Parameter], ranks: Ranks, bucket_bytes: int = _BUCKET_BYTES) -> None:
        """On a single rank nothing happens to the gradients."""
        self._ranks = ranks
        self._buckets: list[_Bucket] = []
        self._under_way: list[Callable[[], None]] = []
        last = list(reversed(weights)) if ranks.world_size > 1 else []
        while last:
            own = [last.pop(0)]
            while last and sum(weight.numel() * weight.element_size() for weight in own) < bucket_bytes:
                own.append(last.pop(0))
            flat = own[0].new_empty(sum(weight.numel() for weight in own))
            bucket = _Bucket(own, list(flat.split([weight.numel() for weight in own])), flat)
            self._buckets.append(bucket)
            for weight in own:
                weight.register_post_accumulate_grad_hook(partial(self._added, bucket))
        self._num_sent = len(self._buckets)

    def begin(self, num_losses: int) -> None:
        """Before the backward passes of a step: of so many losses, each of which reaches every weight."""
        self._num_sent = 0
        self._under_way.clear()
        for bucket in self._buckets:
            bucket.num_awaited = num_losses * len(bucket.weights)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward pass: wait, on the device, until the gradients are those of all ranks."""
        self._send(len(self._buckets))  # what a weight without a gradient has kept back
        for wait in self._under_way:
            wait()
        self._under_way.clear()

    def _added(self, bucket: _Bucket, _: Tensor) -> None:
        """A gradient was added to a weight's."""
        bucket.num_awaited -= 1
        awaited = (number for number, other in enumerate(self._buckets) if other.num_awaited != 0)
        self._send(next(awaited, len(self._buckets)))

    @torch.no_grad()
    def _send(self, stop: int) -> None:
        """All buckets before that number which have not been sent."""
        for bucket in self._buckets[self._num_sent : stop]:
            pairs = zip(bucket.weights, bucket.parts, strict=True)
            given = [(weight, part, weight.grad) for weight, part in pairs if weight.grad is not None]
            if len(given) < len(bucket.weights):
                bucket.flat.zero_()
            views = [part.as_strided(g.shape, g.stride(), part.storage_offset()) for _, part, g in given]
            torch._foreach_copy_(views, [gradient for _, _, gradient in given])
            for (weight, _, _), view in zip(given, views, strict=True):
                weight.grad = view
            self._under_way.append(self._ranks.begin_all_reduce_sum(bucket.flat))
            self._num_sent += 1
