"""Batch-norm over the images of all ranks, on any device.

torch's SyncBatchNorm runs on GPUs alone. As MoCo's `naiveSyncBN`, statistics are sums over the ranks; unlike there each
rank counts by its number of values, so the result is that of one rank with all images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """As BatchNorm2d, [N, C, H, W]; in training mode, with statistics over all ranks of the process group."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = wide.new_full((1,), wide.numel() // wide.shape[1])
        sums = torch.cat([wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3)), count])
        total = _SumOverRanks.apply(sums)
        num_values = total[-1].detach().clamp(min=1)
        mean, mean_square = (total[:-1] / num_values).chunk(2)
        variance = (mean_square - mean.square()).clamp(min=0)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            unbiased = variance * (num_values / (num_values - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def synchronised(network: nn.Module) -> nn.Module:
    """The network with every BatchNorm2d replaced, parameters and statistics kept."""
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm2d:
            replacement = SynchronisedBatchNorm2d(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            replacement.to(child.weight.device, child.weight.dtype)
            setattr(network, name, replacement)
        else:
            synchronised(child)
    return network


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; every rank's loss depends on it, so its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
