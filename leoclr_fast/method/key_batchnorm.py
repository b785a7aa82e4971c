"""Batch-norm of the key encoder: over which images its statistics are taken, so that they cannot leak the answer.

If a query and its key share their batch statistics, the network can find the positive without looking at the image;
MoCo shuffles the keys between GPUs against that. Each mode here changes the result and has a name in the config.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.config import MethodConfig
from leoclr_fast.distributed.batch_statistics import batch_statistics
from leoclr_fast.distributed.collectives import Ranks


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
        if self.mode == "split":
            return self._normalise_groups(images, max(1, len(images) // self.group_size))
        if self.mode == "sync" and self.ranks.world_size > 1:
            return self._normalise_over_ranks(images)
        return self._normalise(images)

    def _normalise(self, images: Tensor) -> Tensor:
        return F.batch_norm(images, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _normalise_groups(self, images: Tensor, num_groups: int) -> Tensor:
        if torch.compiler.is_compiling():
            return self._normalise_groups_for_compiler(images, num_groups)
        normalised = torch.empty_like(images)  # each group writes its part: torch.cat would be one more pass
        mean, deviation = torch.empty_like(self.weight), torch.empty_like(self.weight)
        for group, part in zip(images.tensor_split(num_groups), normalised.tensor_split(num_groups), strict=True):
            torch.ops.aten.native_batch_norm.out(
                group, self.weight, self.bias, None, None, True, 0.0, self.eps,
                out=part, save_mean=mean, save_invstd=deviation,
            )  # fmt: skip
        return normalised

    def _normalise_groups_for_compiler(self, images: Tensor, num_groups: int) -> Tensor:
        """One reduction and one pointwise pass over all groups, where they are of one size."""
        if len(images) % num_groups:
            return torch.cat([self._normalise(group) for group in images.tensor_split(num_groups)])
        wide = images.double() if images.dtype == torch.float64 else images.float()
        groups = wide.unflatten(0, (num_groups, -1))  # [G, n, C, H, W]
        variance, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0, keepdim=True)
        unit = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        return (unit * self.weight[:, None, None] + self.bias[:, None, None]).to(images.dtype)

    def _normalise_over_ranks(self, images: Tensor) -> Tensor:
        mean, variance, _ = batch_statistics(images, self.ranks)
        return F.batch_norm(images, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


def convert_key_batchnorm(key_encoder: nn.Module, config: MethodConfig, ranks: Ranks) -> None:
    """Replace every batch-norm of the key encoder by the configured one; names and values of its tensors stay."""
    mode: str = config.key_batchnorm
    if mode == "shuffle":
        mode = "split" if ranks.world_size == 1 else "plain"
    for parent in list(key_encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, KeyBatchNorm2d(child, mode, config.key_batchnorm_group, ranks))
