"""Batch-norm of the key encoder: over which images its statistics are taken, so that they cannot leak the answer.

If a query and its key share their batch statistics, the network can find the positive without looking at the image;
MoCo shuffles the keys between GPUs against that. Each mode here changes the result and has a name in the config.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.config import MethodConfig
from leoclr_fast.distributed import Ranks


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
            groups = images.tensor_split(max(1, len(images) // self.group_size))
            return torch.cat([self._normalise(group) for group in groups])
        if self.mode == "sync" and self.ranks.world_size > 1:
            return self._normalise_over_ranks(images)
        return self._normalise(images)

    def _normalise(self, images: Tensor) -> Tensor:
        return F.batch_norm(images, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _normalise_over_ranks(self, images: Tensor) -> Tensor:
        wide = images.double() if images.dtype == torch.float64 else images.float()
        dims = (0, 2, 3)
        total = torch.cat((wide.sum(dims), wide.new_full((1,), wide.numel() / wide.shape[1])))
        self.ranks.all_reduce_sum([total])
        mean, count = total[:-1] / total[-1], total[-1]
        # A second pass over the deviations: sums of squares would cancel.
        variance = (wide - mean[:, None, None]).square().sum(dims)
        self.ranks.all_reduce_sum([variance])
        return F.batch_norm(images, mean, variance / count, self.weight, self.bias, training=False, eps=self.eps)


def convert_key_batchnorm(key_encoder: nn.Module, config: MethodConfig, ranks: Ranks) -> None:
    """Replace every batch-norm of the key encoder by the configured one; names and values of its tensors stay."""
    mode: str = config.key_batchnorm
    if mode == "shuffle":
        mode = "split" if ranks.world_size == 1 else "plain"
    for parent in list(key_encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, KeyBatchNorm2d(child, mode, config.key_batchnorm_group, ranks))
