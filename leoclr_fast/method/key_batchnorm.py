"""Batch-norm of the key encoder: over which images its statistics are taken, so that they cannot leak the answer.

If a query and its key share their batch statistics, the network can find the positive without looking at the image;
MoCo shuffles the keys between GPUs against that. Each mode here changes the result and has a name in the config.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.config import MethodConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import batch_statistics, replace_batchnorm
from leoclr_fast.method.split_batchnorm import NormaliseEqualGroups, group_sizes


class KeyBatchNorm2d(nn.BatchNorm2d):
    """Batch-norm that takes its statistics over groups of a batch, over all ranks, or from its running statistics.

    Needs no autograd and keeps no running statistics of its own: in mode `ema` they are the query's, averaged.
    """

    def __init__(self, source: nn.BatchNorm2d, mode: str, group_size: int, ranks: Ranks) -> None:
        super().__init__(source.num_features, source.eps, device=source.weight.device, dtype=source.weight.dtype)
        self.load_state_dict(source.state_dict())
        self.requires_grad_(False)
        self.mode = mode
        self.group_size = group_size
        self.ranks = ranks

    def forward(self, images: Tensor) -> Tensor:
        if self.mode == "ema":
            return F.batch_norm(
                images, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        if self.mode == "sync" and self.ranks.world_size > 1:
            return self._normalise_over_ranks(images)
        sizes = group_sizes(len(images), self.group_size if self.mode == "split" else len(images))
        if torch.compiler.is_compiling() and sizes[0] == sizes[-1]:
            return NormaliseEqualGroups.apply(images, len(sizes), self.weight, self.bias, self.eps)[0]
        return self._normalise(images) if len(sizes) == 1 else self._normalise_groups(images, sizes)

    def _normalise(self, images: Tensor) -> Tensor:
        return F.batch_norm(images, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _normalise_groups(self, images: Tensor, sizes: list[int]) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.cat([self._normalise(group) for group in images.split(sizes)])
        normalised = torch.empty_like(images)  # each group writes its part: torch.cat would be one more pass
        mean, deviation = torch.empty_like(self.weight), torch.empty_like(self.weight)
        for group, part in zip(images.split(sizes), normalised.split(sizes), strict=True):
            torch.ops.aten.native_batch_norm.out(
                group, self.weight, self.bias, None, None, True, 0.0, self.eps,
                out=part, save_mean=mean, save_invstd=deviation,
            )  # fmt: skip
        return normalised

    def _normalise_over_ranks(self, images: Tensor) -> Tensor:
        mean, variance, _ = batch_statistics(images, self.ranks)
        return F.batch_norm(images, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


def convert_key_batchnorm(key_encoder: nn.Module, config: MethodConfig, ranks: Ranks) -> None:
    """Replace every batch-norm of the key encoder by the configured one; names and values of its tensors stay."""
    mode = "split" if config.key_batchnorm == "shuffle" else config.key_batchnorm
    replace_batchnorm(key_encoder, lambda norm: KeyBatchNorm2d(norm, mode, config.key_batchnorm_group, ranks))
