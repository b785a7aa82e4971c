"""Batch-norm of trained networks over the images of all ranks, with gradients: as if one rank had them all.

torch.nn.SyncBatchNorm is the same, but for GPUs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leoclr_fast.distributed.collectives import Ranks

_CHANNEL_DIMS = (0, 2, 3)
"""What is summed over in [B, C, H, W]."""


class BatchStatistics(NamedTuple):
    """float64 for float64 images, else float32."""

    mean: Tensor
    """[C]."""
    variance: Tensor
    """[C], biased."""
    num_values: Tensor
    """[1]: of each channel."""


def _widened(images: Tensor) -> Tensor:
    """In the dtype that statistics are summed in: float64 stays, all else is float32."""
    return images if images.dtype == torch.float64 else images.float()


@torch.no_grad()
def batch_statistics(images: Tensor, ranks: Ranks) -> BatchStatistics:
    """The statistics of all ranks' images; each rank gives its own, [B, C, H, W], and B may differ between them.

    One collective: an all-gather of each rank's mean, variance and count, which every rank merges alike, in the order
    of the ranks (Chan, Golub, LeVeque 1983). Sums of squares would cancel.
    """
    wide = _widened(images)
    variance, mean = torch.var_mean(wide, _CHANNEL_DIMS, correction=0)
    count = wide.new_full((1,), wide.numel() / wide.shape[1])
    if ranks.world_size == 1:
        return BatchStatistics(mean, variance, count)
    gathered = ranks.all_gather_padded(torch.cat((mean, variance, count))[None], 1)  # [ranks, 2 C + 1]
    means, variances, counts = gathered.split((len(mean), len(mean), 1), dim=1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count
    variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count
    return BatchStatistics(mean, variance, count)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """In training, `torch.nn.BatchNorm2d` of the batch that all ranks have together; else the same as it.

    The running statistics, too, are those of the whole batch, and so the same on every rank. The gradients of weight
    and bias are this rank's terms, to be summed over the ranks as those of all other weights.
    """

    def __init__(self, source: nn.BatchNorm2d, ranks: Ranks) -> None:
        super().__init__(
            source.num_features, source.eps, source.momentum, device=source.weight.device, dtype=source.weight.dtype
        )
        self.load_state_dict(source.state_dict())
        self.ranks = ranks

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        statistics = batch_statistics(images, self.ranks)
        self._follow(statistics)
        output: Tensor = _Normalise.apply(images, self.weight, self.bias, statistics, self.eps, self.ranks)
        return output

    @torch.no_grad()
    def _follow(self, statistics: BatchStatistics) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        unbiased = statistics.variance * (statistics.num_values / (statistics.num_values - 1))
        self.running_mean.lerp_(statistics.mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class _Normalise(torch.autograd.Function):
    """Batch-norm whose statistics were taken over all ranks, and depend on the images. [B, C, H, W]."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, statistics: BatchStatistics, eps: float, ranks: Ranks
    ) -> Tensor:
        ctx.save_for_backward(images, weight, *statistics)
        ctx.eps, ctx.ranks = eps, ranks
        mean, variance, _ = statistics
        return F.batch_norm(images, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dx = w/s (dy - mean(dy) - x' mean(dy x')), with means over the images of all ranks and x' = (x - m)/s."""
        images, weight, mean, variance, num_values = ctx.saved_tensors
        if images.is_contiguous(memory_format=torch.channels_last):
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        inverse_deviation = torch.rsqrt(variance + ctx.eps)
        unit = (_widened(images) - _per_channel(mean)) * _per_channel(inverse_deviation)
        wide = _widened(gradient)
        bias_gradient, weight_gradient = wide.sum(_CHANNEL_DIMS), (wide * unit).sum(_CHANNEL_DIMS)
        means = torch.stack((bias_gradient, weight_gradient))
        ctx.ranks.all_reduce_sum([means])
        mean_gradient, mean_product = means / num_values
        centred = wide - _per_channel(mean_gradient) - unit * _per_channel(mean_product)
        image_gradient = centred * _per_channel(weight * inverse_deviation)
        return (
            image_gradient.to(images.dtype),
            weight_gradient.to(weight.dtype),
            bias_gradient.to(weight.dtype),
            None,
            None,
            None,
        )


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def replace_batchnorm(network: nn.Module, replacement: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every batch-norm of a network by the one that is made of it; names of its tensors stay."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, replacement(child))
