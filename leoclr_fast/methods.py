"""LeOCLR and MoCo-v2: views in, loss out. They share every line but the list of their views.

The first view is the query's, all others are keys': LeOCLR has (original, crop, crop), MoCo-v2 (crop, crop). With the
sum over the keys in `info_nce`, that list is the whole difference.
Legend: B images of this rank, S side of a view, D projection, P key views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import ClassVar

import torch
from torch import Tensor, nn

from leoclr_fast.backbone import Encoder
from leoclr_fast.config import BackboneConfig, MethodConfig
from leoclr_fast.distributed import Ranks
from leoclr_fast.key_batchnorm import convert_key_batchnorm
from leoclr_fast.key_queue import KeyQueue
from leoclr_fast.losses.info_nce import InfoNCEImpl, info_nce
from leoclr_fast.momentum import update_key_encoder
from pipelines.counter_rng import KEY_SHUFFLE_STREAM, permutation
from pipelines.order import rank_slice
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS, ViewRecipe


class MomentumContrast(nn.Module):
    """A query encoder, its moving average for the keys, and a queue of negatives.

    A step calls, in moco's order: `update_key_encoder`, `encode_keys` with its `key_orders`, `query_encoder`, `loss`,
    and after the backward pass `enqueue`, so that the logits see the queue as it was.
    """

    views: ClassVar[ViewRecipe]

    def __init__(self, backbone: BackboneConfig, config: MethodConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks or Ranks()
        self.query_encoder = Encoder(backbone, config.projection_dim)
        self.key_encoder = deepcopy(self.query_encoder).requires_grad_(False)
        convert_key_batchnorm(self.key_encoder, config, self.ranks)
        self.queue = KeyQueue(config.queue_size, config.projection_dim)

    def update_key_encoder(self) -> None:
        """Move the key encoder towards the query encoder; running statistics only in `ema` mode."""
        include_buffers = self.config.key_batchnorm == "ema"
        update_key_encoder(
            self.key_encoder, self.query_encoder, self.config.key_momentum, include_buffers=include_buffers
        )

    def key_orders(self, num_images: int, global_batch: int, seed: int, step: int) -> list[Tensor]:
        """The order of the images in each pass of the key encoder, a permutation that (seed, step) determine.

        num_images: of this rank. Returns int64 tensors on the host; none where batch-norm does not depend on the order.
        """
        if not self._shuffles:
            return []
        views_a_pass = self.config.num_keys if self.config.key_passes == "joint" else 1
        length = views_a_pass * (global_batch if self._shuffles_across_ranks else num_images)
        num_passes = self.config.num_keys // views_a_pass
        streams = range(KEY_SHUFFLE_STREAM, KEY_SHUFFLE_STREAM + num_passes)
        return [torch.from_numpy(permutation(seed, step, length, stream)) for stream in streams]

    @torch.no_grad()
    def encode_keys(
        self,
        views: Sequence[Tensor],
        orders: Sequence[Tensor],
        global_batch: int,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Keys of the key views: P tensors [B, D], unit rows, in the order of the images.

        views: P tensors [B, 3, S, S]. orders: those of `key_orders`, on the device of the views. encoder: what stands
        for the key encoder, and computes the same.
        """
        encoder = self.key_encoder if encoder is None else encoder
        passes = [list(views)] if self.config.key_passes == "joint" else [[images] for images in views]
        if not self._shuffles:
            keys = [encoder(_joined(images)).chunk(len(images)) for images in passes]
        else:
            keys = [
                self._encode_shuffled(images, order, global_batch, encoder)
                for images, order in zip(passes, orders, strict=True)
            ]
        return [key for one_pass in keys for key in one_pass]

    def loss(self, query: Tensor, keys: Sequence[Tensor], impl: InfoNCEImpl = "auto") -> Tensor:
        """Eq. 2 of the paper over this rank's images: the sum, or mean, over the keys of the InfoNCE batch means.

        query and each of keys: [B, D], unit rows. Returns a scalar.
        """
        total = info_nce(query, keys, self.queue.keys, self.config.temperature, impl)
        return total if self.config.loss_reduction == "sum" else total / len(keys)

    @torch.no_grad()
    def similarities(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cosine similarity of the queries to their keys and to the queue: two scalars, to be watched."""
        positive = torch.stack([(query * key).sum(dim=1).mean() for key in keys]).mean()
        negative = (query @ self.queue.keys.mean(dim=0)).mean()
        return positive, negative

    def enqueue(self, keys: Sequence[Tensor], global_batch: int) -> None:
        """Put the step's keys (P tensors [B, D]) of all ranks into the queue: the first crop's, or all."""
        for key in keys if self.config.enqueue == "all" else keys[:1]:
            self.queue.enqueue(self.ranks.all_gather_rows(key, global_batch))

    @property
    def _shuffles(self) -> bool:
        return self.config.key_batchnorm in ("shuffle", "split")

    @property
    def _shuffles_across_ranks(self) -> bool:
        return self.config.key_batchnorm == "shuffle" and self.ranks.world_size > 1

    def _encode_shuffled(
        self, views: Sequence[Tensor], order: Tensor, global_batch: int, encoder: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """One forward of the key encoder over one or several views, its images in `order`."""
        ranks, across_ranks = self.ranks, self._shuffles_across_ranks
        images = _joined([ranks.all_gather_rows(view, global_batch) if across_ranks else view for view in views])
        own = rank_slice(len(images), ranks.rank, ranks.world_size) if across_ranks else slice(None)
        shuffled_keys = encoder(images[order[own]])
        if across_ranks:
            shuffled_keys = ranks.all_gather_rows(shuffled_keys, len(images))
        keys = torch.empty_like(shuffled_keys).index_copy_(0, order, shuffled_keys).chunk(len(views))
        local = rank_slice(global_batch, ranks.rank, ranks.world_size) if across_ranks else slice(None)
        return tuple(key[local] for key in keys)


def _joined(views: Sequence[Tensor]) -> Tensor:
    """One batch of them all; a single one is not copied."""
    return views[0] if len(views) == 1 else torch.cat(list(views))


class LeOCLR(MomentumContrast):
    """The uncropped original is the query; two random crops of it are its keys (Algorithm 1 of the paper)."""

    views = LEOCLR_VIEWS


class MoCoV2(MomentumContrast):
    """One random crop is the query, another one its key (Chen, Fan, Girshick, He 2020)."""

    views = MOCOV2_VIEWS


METHODS: dict[str, type[MomentumContrast]] = {"leoclr": LeOCLR, "mocov2": MoCoV2}


def build_method(
    backbone: BackboneConfig, config: MethodConfig, seed: int, ranks: Ranks | None = None
) -> MomentumContrast:
    """The configured method with weights and queue drawn from `seed`, on the CPU; the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return METHODS[config.name](backbone, config, ranks)
