"""Mean and variance of each channel over the images of all ranks: what synchronised batch-norm normalises by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leoclr_fast.distributed.collectives import Ranks

CHANNEL_DIMS = (0, 2, 3)
"""What is summed over in [B, C, H, W]."""


class BatchStatistics(NamedTuple):
    """float64 for float64 images, else float32."""

    mean: Tensor
    """[C]."""
    variance: Tensor
    """[C], biased."""
    num_values: Tensor
    """[1]: of each channel."""


def widened(images: Tensor) -> Tensor:
    """In the dtype that statistics are summed in: float64 stays, all else is float32."""
    return images if images.dtype == torch.float64 else images.float()


@torch.no_grad()
def batch_statistics(images: Tensor, ranks: Ranks) -> BatchStatistics:
    """The statistics of all ranks' images; each rank gives its own, [B, C, H, W], and B may differ between them.

    One collective: an all-gather of each rank's mean, variance and count, which every rank merges alike, in the order
    of the ranks (Chan, Golub, LeVeque 1983). Sums of squares would cancel.
    """
    wide = widened(images)
    variance, mean = torch.var_mean(wide, CHANNEL_DIMS, correction=0)
    count = wide.new_full((1,), wide.numel() / wide.shape[1])
    if ranks.world_size == 1:
        return BatchStatistics(mean, variance, count)
    gathered = ranks.all_gather_padded(torch.cat((mean, variance, count))[None], 1)  # [ranks, 2 C + 1]
    means, variances, counts = gathered.split((len(mean), len(mean), 1), dim=1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count
    variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count
    return BatchStatistics(mean, variance, count)
