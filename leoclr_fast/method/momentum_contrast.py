"""Momentum contrast: a query encoder, its moving average for the keys, and a queue of negatives.

The first view is the query's, all others are keys': with the sum over the keys in `info_nce`, the list of views is the
whole difference between LeOCLR (original, crop, crop) and MoCo-v2 (crop, crop).
Legend: B images of this rank, G of all ranks together, b of this rank in a micro-batch, S side of a view, D projection,
P keys of each query, N key views that this rank encodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from leoclr_fast.config import InfoNCEImpl, ResultConfig, SpeedConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d, replace_batchnorm
from leoclr_fast.losses.info_nce import info_nce
from leoclr_fast.machine.precision import encoder_dtype, view_dtype
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.half_encoder import HalfEncoder
from leoclr_fast.method.key_batchnorm import KeyBatchNorm2d, convert_key_batchnorm
from leoclr_fast.method.key_queue import KeyQueue
from leoclr_fast.method.key_schedule import KeyOrder, KeySchedule, fitting_group
from leoclr_fast.method.method import Method, PartialLoss, StepTools
from leoclr_fast.method.split_batchnorm import SplitBatchNorm2d
from pipelines.batch import CropBatch

log = logging.getLogger(__name__)


class MomentumContrast(Method):
    """A step, in moco's order: move the key encoder, encode the keys, then for each micro-batch query and loss, and
    after the backward pass the keys enter the queue, so that the logits see the queue as it was.
    """

    encoder_name = "query_encoder"
    metric_names: ClassVar[tuple[str, ...]] = ("positive_similarity", "negative_similarity")

    def __init__(self, result: ResultConfig, ranks: Ranks) -> None:
        super().__init__(result, ranks)
        self.num_keys = len(self.views) - 1
        micro_batches = min(result.micro_batches, result.batch_size)
        layout = BatchLayout(batch_size=result.batch_size, micro_batches=micro_batches, world_size=ranks.world_size)
        self._wanted_group = result.method.key_batchnorm_group
        fitting = fitting_group(result.method, layout, self.num_keys)
        self.config = config = replace(result.method, key_batchnorm_group=fitting)
        self.seed, self.batch_size = result.seed, result.batch_size
        self.loss_impl: InfoNCEImpl = "auto"
        self.query_encoder = Encoder(result.backbone, config.projection_dim, config.projection_layers)
        self.key_encoder = deepcopy(self.query_encoder).requires_grad_(False)
        convert_key_batchnorm(self.key_encoder, config, ranks)
        if config.query_batchnorm == "sync" and ranks.world_size > 1:
            replace_batchnorm(self.query_encoder, lambda norm: SyncBatchNorm2d(norm, ranks))
        else:
            group = config.query_batchnorm_group if config.query_batchnorm == "split" else None
            replace_batchnorm(self.query_encoder, lambda norm: SplitBatchNorm2d(norm, group))
        self.queue = KeyQueue(config.queue_size, config.projection_dim)
        self._rounded: tuple[HalfEncoder, ...] = ()  # in a tuple: its weights are none of this module's

    @classmethod
    def require(cls, result: ResultConfig) -> None:
        """Raises ValueError for a queue that one step would overwrite."""
        enqueued = result.batch_size * (len(cls.views) - 1 if result.method.enqueue == "all" else 1)
        if result.method.queue_size < enqueued:
            raise ValueError(
                f"a queue of {result.method.queue_size} keys is smaller than the {enqueued} keys of one step; "
                f"give --method.queue-size of at least {enqueued}, or a smaller --batch-size"
            )

    def compiled_encoders(self) -> list[nn.Module]:
        """Not those whose batch-norm talks to other ranks."""
        modes = {self.query_encoder: self.config.query_batchnorm, self._key_encoder: self.config.key_batchnorm}
        return [encoder for encoder, mode in modes.items() if mode != "sync" or self.ranks.world_size == 1]

    def prepare(self, speed: SpeedConfig) -> None:
        self.loss_impl = speed.loss_impl
        dtype = view_dtype(speed.precision)
        if dtype != encoder_dtype(speed.precision):
            self._rounded = (HalfEncoder(self.key_encoder, dtype),)

    @property
    def _key_encoder(self) -> nn.Module:
        return self._rounded[0] if self._rounded else self.key_encoder

    def plan(self, layout: BatchLayout) -> KeySchedule:
        """Raises ValueError where a shuffle of the configured batch would hide nothing; warns if none was asked for."""
        schedule = KeySchedule(self.config, layout, self.num_keys)
        if layout.batch_size == self.batch_size:
            mode, group = self.config.key_batchnorm, self.config.key_batchnorm_group
            if self.ranks.is_main and group != self._wanted_group:
                log.info(
                    "key batch-norm %s in groups of %d: a batch of %d on %d ranks in %d micro-batches is too small for "
                    "groups of %d", mode, group, layout.batch_size, layout.world_size, layout.micro_batches,
                    self._wanted_group,
                )  # fmt: skip
            if leak := schedule.leak():
                self._report_leak(leak, layout)
        return schedule

    def _report_leak(self, leak: str, layout: BatchLayout) -> None:
        mode = self.config.key_batchnorm
        why = f"{leak}, and a query can recognise its key by the statistics that both were normalised with"
        if mode not in ("shuffle", "split"):
            if self.ranks.is_main:
                log.warning("key batch-norm %s: %s", mode, why)
            return
        others = "--method.key-batchnorm shuffle, " * (mode == "split" and layout.world_size > 1)
        raise ValueError(
            f"a batch of {layout.batch_size} on {layout.world_size} ranks in {layout.micro_batches} micro-batches "
            f"cannot be shuffled by key batch-norm {mode}: {why}; give a larger --batch-size, {others}"
            "--method.key-batchnorm ema, or plain to accept that"
        )

    def inputs(
        self, plan: KeySchedule, batch: CropBatch, parameters: Tensor, step: int, tools: StepTools
    ) -> list[Tensor]:
        """The query's crops [B, S, S, 3], the crops of the keys that this rank encodes [N, S, S, 3], the parameters of
        the augmentation [B + N, 13], and the place of every key [P * G].

        The ranks hand each other the crops whose keys another one encodes: uint8, before the augmentation, whose
        parameters travel with them.
        """
        size, num_views = batch.crops.shape[:2]
        query_table, key_table = parameters.split((size, len(parameters) - size))
        order = plan.draw(self.seed, step)
        rows, views = torch.from_numpy(order.sent_rows), torch.from_numpy(order.sent_views)
        key_table = key_table[views * size + rows]
        key_crops = batch.crops.flatten(0, 1)[tools.to_device(rows * num_views + 1 + views)]
        table = torch.cat((query_table, key_table))
        if plan.exchanges:
            key_crops, key_table = self._exchanged(key_crops, tools.to_device(key_table), order, tools)
            table = torch.cat((tools.to_device(query_table), key_table))
        return [batch.crops[:, 0], key_crops, table, torch.from_numpy(order.restore)]

    def _exchanged(self, crops: Tensor, table: Tensor, order: KeyOrder, tools: StepTools) -> tuple[Tensor, Tensor]:
        """Hand the crops [M, S, S, 3] to the ranks that encode them, each with its row of parameters: one all-to-all
        of bytes. Returns the crops that this rank encodes and their parameters, in the order of its passes."""
        pixels = crops.flatten(1)
        sent = torch.cat((pixels, table.view(torch.uint8)), dim=1)
        received = self.ranks.all_to_all_rows(sent, order.send_sizes, order.receive_sizes)
        place = tools.to_device(torch.from_numpy(order.place))
        pixels, rows = (
            part[place] for part in received.split((pixels.shape[1], received.shape[1] - pixels.shape[1]), 1)
        )
        return pixels.unflatten(1, crops.shape[1:]), rows.view(torch.float64)

    def losses(self, plan: KeySchedule, inputs: Sequence[Tensor], tools: StepTools) -> Iterator[PartialLoss]:
        query_crops, key_crops, table, restore = inputs
        query_table, key_table = table.split((len(query_crops), len(key_crops)))
        query_views = tools.views(query_crops, query_table, self.views[:1], plan.layout.own_sizes)
        key_views = tools.views(key_crops, key_table, self.views[1:2], self.forward_sizes(plan, key_crops.is_cuda))

        self.update_key_encoder()
        keys = self.encode_keys(key_views, restore, plan.largest, tools.encode(self._key_encoder))  # P x [G, D]
        encode_query = tools.encode(self.query_encoder)
        for view, images in zip(query_views, plan.layout.own, strict=True):  # [b, 3, S, S], a slice of the batch
            query = encode_query(view)  # [b, D]
            positives = [key[images] for key in keys]
            yield PartialLoss(self.loss(query, positives), len(view), self.similarities(query, positives))
        self.count_batches(plan.layout.micro_batches)
        self.enqueue(keys)

    def count_batches(self, num_batches: int) -> None:
        """In the query encoder's batch-norms, as torch's would: in one addition, where they have a hundred."""
        norms = (m for m in self.query_encoder.modules() if isinstance(m, SplitBatchNorm2d) and m.training)
        if counters := [norm.num_batches_tracked for norm in norms]:
            torch._foreach_add_(counters, num_batches)

    def forward_sizes(self, plan: KeySchedule, on_gpu: bool) -> list[int]:
        """How many key views go through the key encoder at once.

        On a GPU those of a micro-batch's passes together, for half the launches, where each image is normalised with
        the same others as in passes of their own; on a CPU one pass after the other, whose tensors fit its caches.
        """
        sizes, group = plan.pass_sizes, self.config.key_batchnorm_group
        (mode,) = {norm.mode for norm in self.key_encoder.modules() if isinstance(norm, KeyBatchNorm2d)}
        joinable = mode == "ema" or (mode == "split" and all(size % group == 0 for size in sizes))
        if not on_gpu or not joinable:
            return sizes
        together = len(sizes) // len(plan.layout.parts)
        return [sum(sizes[first : first + together]) for first in range(0, len(sizes), together)]

    def update_key_encoder(self) -> None:
        """Move the key encoder towards the query encoder; running statistics only in `ema` mode."""
        include_buffers = self.config.key_batchnorm == "ema"
        update_key_encoder(
            self.key_encoder, self.query_encoder, self.config.key_momentum, include_buffers=include_buffers
        )
        for rounded in self._rounded:
            rounded.refresh()

    @torch.no_grad()
    def encode_keys(
        self,
        passes: Iterable[Tensor],
        restore: Tensor,
        largest: int,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Keys of all ranks: P tensors [G, D], unit rows, in the order of the images. One collective.

        passes: the views that this rank encodes in each pass of the key encoder, [n, 3, S, S]; made when their turn
        comes, if it is a generator. restore, largest: of the step's `KeyOrder` and `KeySchedule`; restore is on the
        device of the views. encoder: what stands for the key encoder, and computes the same.
        """
        encoder = self.key_encoder if encoder is None else encoder
        keys = self.ranks.all_gather_padded(torch.cat([encoder(views) for views in passes]), largest)
        return list(keys.index_select(0, restore).chunk(self.num_keys))

    def loss(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        """Eq. 2 of the paper over this rank's images: the sum, or mean, over the keys of the InfoNCE batch means.

        query and each of keys: [B, D], unit rows, of the same images. Returns a scalar.
        """
        total = info_nce(query, keys, self.queue.keys, self.config.temperature, self.loss_impl)
        return total if self.config.loss_reduction == "sum" else total / len(keys)

    @torch.no_grad()
    def similarities(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cosine similarity of the queries to their keys and to the queue: two scalars, to be watched."""
        positive = torch.stack([(query * key).sum(dim=1).mean() for key in keys]).mean()
        negative = (query @ self.queue.keys.mean(dim=0)).mean()
        return positive, negative

    def enqueue(self, keys: Sequence[Tensor]) -> None:
        """Put the step's keys of all ranks (P tensors [G, D]) into the queue: the first crop's, or all."""
        for key in keys if self.config.enqueue == "all" else keys[:1]:
            self.queue.enqueue(key)


@torch.no_grad()
def update_key_encoder(
    key_encoder: nn.Module, query_encoder: nn.Module, momentum: float, *, include_buffers: bool = False
) -> None:
    """key <- momentum * key + (1 - momentum) * query, in place, for all of them in one call.

    The storage never moves, so a captured graph stays valid. include_buffers: also the running statistics of
    batch-norm (EMAN); counters are copied.
    """
    pairs: list[tuple[Tensor, Tensor]] = list(zip(key_encoder.parameters(), query_encoder.parameters(), strict=True))
    if include_buffers:
        buffers = list(zip(key_encoder.buffers(), query_encoder.buffers(), strict=True))
        pairs += [pair for pair in buffers if pair[0].is_floating_point()]
        counters = [pair for pair in buffers if not pair[0].is_floating_point()]
        torch._foreach_copy_([key for key, _ in counters], [query for _, query in counters])
    torch._foreach_lerp_([key for key, _ in pairs], [query for _, query in pairs], 1 - momentum)
