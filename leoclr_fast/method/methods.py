"""LeOCLR and MoCo-v2: views in, loss out. They share every line but the list of their views.

The first view is the query's, all others are keys': LeOCLR has (original, crop, crop), MoCo-v2 (crop, crop). With the
sum over the keys in `info_nce`, that list is the whole difference.
Legend: B images of this rank, G of all ranks together, S side of a view, D projection, P key views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import ClassVar

import torch
from torch import Tensor, nn

from leoclr_fast.config import BackboneConfig, MethodConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import convert_query_batchnorm
from leoclr_fast.losses.info_nce import InfoNCEImpl, info_nce
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.key_batchnorm import convert_key_batchnorm
from leoclr_fast.method.key_queue import KeyQueue
from leoclr_fast.method.momentum import update_key_encoder
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS, ViewRecipe


class MomentumContrast(nn.Module):
    """A query encoder, its moving average for the keys, and a queue of negatives.

    A step calls, in moco's order: `update_key_encoder`, `encode_keys` in the order of a `KeySchedule`, `query_encoder`,
    `loss`, and after the backward pass `enqueue`, so that the logits see the queue as it was.
    """

    views: ClassVar[ViewRecipe]

    def __init__(self, backbone: BackboneConfig, config: MethodConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks or Ranks()
        self.query_encoder = Encoder(backbone, config.projection_dim)
        self.key_encoder = deepcopy(self.query_encoder).requires_grad_(False)
        convert_key_batchnorm(self.key_encoder, config, self.ranks)
        if config.query_batchnorm == "sync" and self.ranks.world_size > 1:
            convert_query_batchnorm(self.query_encoder, self.ranks)
        self.queue = KeyQueue(config.queue_size, config.projection_dim)

    def update_key_encoder(self) -> None:
        """Move the key encoder towards the query encoder; running statistics only in `ema` mode."""
        include_buffers = self.config.key_batchnorm == "ema"
        update_key_encoder(
            self.key_encoder, self.query_encoder, self.config.key_momentum, include_buffers=include_buffers
        )

    @torch.no_grad()
    def encode_keys(
        self,
        passes: Iterable[Tensor],
        restore: Tensor,
        most: int,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Keys of all ranks: P tensors [G, D], unit rows, in the order of the images. One collective.

        passes: the views that this rank encodes in each pass of the key encoder, [n, 3, S, S]; made when their turn
        comes, if it is a generator. restore, most: of the step's `KeyOrder` and `KeySchedule`; restore is on the
        device of the views. encoder: what stands for the key encoder, and computes the same.
        """
        encoder = self.key_encoder if encoder is None else encoder
        keys = self.ranks.all_gather_padded(torch.cat([encoder(views) for views in passes]), most)
        return list(keys.index_select(0, restore).chunk(self.config.num_keys))

    def loss(self, query: Tensor, keys: Sequence[Tensor], impl: InfoNCEImpl = "auto") -> Tensor:
        """Eq. 2 of the paper over this rank's images: the sum, or mean, over the keys of the InfoNCE batch means.

        query and each of keys: [B, D], unit rows, of the same images. Returns a scalar.
        """
        total = info_nce(query, keys, self.queue.keys, self.config.temperature, impl)
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
