"""Batch-norm over groups of a batch: one GPU normalises as MoCo-v2's eight did, each of which had 32 images.

Legend: B images in a batch, G groups of it, n images of a group, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_sizes(num_images: int, least: int) -> list[int]:
    """Sizes of as many groups as there can be of at least `least` images each, one if there are fewer; they differ by
    at most one, as `torch.tensor_split`'s."""
    num_groups = max(1, num_images // least)
    base, extra = divmod(num_images, num_groups)
    return [base + (group < extra) for group in range(num_groups)]


class NormaliseEqualGroups(torch.autograd.Function):
    """Batch-norm of G groups of one size, n images each: one reduction and one pointwise pass over all, for
    torch.compile.

    Sums are of values and squares, in float32 or float64: a quarter of the instructions of torch.var_mean's there. The
    backward pass is written out, as torch's own is, since the one that is derived writes gradients in float32. No
    tensor of the images' size has five dimensions, which the compiler would lay out anew, and not channels-last.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W], normalised, and mean and biased variance of each group, [G, C]."""
        wide = _wide(images)
        mean = _mean_of_groups(wide, num_groups)
        variance = (_mean_of_groups(wide.square(), num_groups) - mean.square()).clamp_min(0)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(images, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        unit = (wide - _of_images(mean, images)) * _of_images(inverse, images)
        normalised = (unit * weight[:, None, None] + bias[:, None, None]).to(images.dtype)
        return normalised, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Of images, weight and bias."""
        images, weight, mean, inverse = ctx.saved_tensors
        unit = (_wide(images) - _of_images(mean, images)) * _of_images(inverse, images)
        # The gradient itself has several readers, so that the compiler writes it down, and not a wide copy.
        of_bias, of_weight = _mean_of_groups(_wide(grad), len(mean)), _mean_of_groups(grad * unit, len(mean))
        rest = grad - _of_images(of_bias, images) - unit * _of_images(of_weight, images)
        of_images = (rest * _of_images(weight * inverse, images)).to(images.dtype)
        num_values = images.numel() // mean.numel()
        return of_images, None, of_weight.sum(0) * num_values, of_bias.sum(0) * num_values, None


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.dtype == torch.float64 else values.float()


def _mean_of_groups(values: Tensor, num_groups: int) -> Tensor:
    return values.mean(dim=(2, 3)).unflatten(0, (num_groups, -1)).mean(dim=1)


def _of_images(values: Tensor, images: Tensor) -> Tensor:
    """What stands for each group, [G, C], for each image: [B, C, 1, 1]."""
    return values[:, None].expand(-1, len(images) // len(values), -1).flatten(0, 1)[:, :, None, None]


class SplitBatchNorm2d(nn.BatchNorm2d):
    """In training, `torch.nn.BatchNorm2d` of each group of a batch by itself; else the same as it.

    The running statistics follow the mean of the groups', as those of MoCo's CIFAR-10 demo and of ranks do. The counter
    of batches is left to the method: one addition for the counters of all layers.
    """

    num_batches_tracked: Tensor

    def __init__(self, source: nn.BatchNorm2d, group_size: int | None) -> None:
        """group_size: None for one group, the whole batch."""
        super().__init__(
            source.num_features, source.eps, source.momentum, device=source.weight.device, dtype=source.weight.dtype
        )
        self.load_state_dict(source.state_dict())
        self.group_size = group_size

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        sizes = group_sizes(len(images), self.group_size or len(images))
        if torch.compiler.is_compiling() and sizes[0] == sizes[-1]:
            normalised, means, variances = NormaliseEqualGroups.apply(
                images, len(sizes), self.weight, self.bias, self.eps
            )
            with torch.no_grad():
                num_values = sizes[0] * images.shape[2] * images.shape[3]
                unbiased = variances.mean(0) * (num_values / (num_values - 1))
                self.running_mean.lerp_(means.mean(0).to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            return normalised
        if len(sizes) == 1:
            return self._normalise(images, self.running_mean, self.running_var)
        means, variances = self.running_mean.repeat(len(sizes), 1), self.running_var.repeat(len(sizes), 1)
        groups = [self._normalise(*group) for group in zip(images.split(sizes), means, variances, strict=True)]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(groups)

    def _normalise(self, images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(images, mean, variance, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
