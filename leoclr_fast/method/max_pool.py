"""The stem's max-pooling, for the compiler: its backward pass gathers.

From torch 2.12 on, inductor makes atomic additions to an NCHW buffer in float32 of the backward pass of
`nn.functional.max_pool2d`, which are slow and do not repeat bit for bit (PyTorch issue 195123). What stands here is
nothing but indexing, which every torch fuses with its neighbours; otherwise a table of inductor's own would have to be
edited, and a kernel of ours would fuse with nothing. Without the compiler, torch's own is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaxPool(nn.MaxPool2d):
    """Max-pooling of 3 x 3 pixels with stride 2 and padding 1, the same with and without the compiler."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            pooled: Tensor = GatheringMaxPool.apply(images)
            return pooled
        return super().forward(images)


class GatheringMaxPool(torch.autograd.Function):
    """`F.max_pool2d(images, 3, 2, 1)`, with its first maximum of a window where there are several, as there."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        # To the right and below, the last window may stick out by one pixel more.
        padded = F.pad(images, (1, 1 + width % 2, 1, 1 + height % 2), value=float("-inf"))
        rows, columns = 2 * ((height + 1) // 2), 2 * ((width + 1) // 2)
        pooled = padded[:, :, :rows:2, :columns:2]
        chosen = torch.zeros_like(pooled, dtype=torch.int8)
        for place in range(1, 9):
            row, column = divmod(place, 3)
            pixels = padded[:, :, row : row + rows : 2, column : column + columns : 2]
            larger = (pixels > pooled) | pixels.isnan()
            pooled, chosen = torch.where(larger, pixels, pooled), torch.where(larger, place, chosen)
        ctx.save_for_backward(chosen)
        ctx.size = (height, width)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Each pixel looks at the one or two windows in each direction that it lies in."""
        (chosen,) = ctx.saved_tensors
        height, width = ctx.size
        wide = torch.promote_types(gradient.dtype, torch.float32)
        first = [torch.arange(size, device=gradient.device) // 2 for size in (height, width)]
        total = None
        for below in (0, 1):
            for right in (0, 1):
                row, column = first[0] + below, first[1] + right
                # Of the pixel in its window; 0 to 2 if it lies in there, and the window exists.
                within_row = torch.arange(height, device=gradient.device) - 2 * row + 1
                within_column = torch.arange(width, device=gradient.device) - 2 * column + 1
                lies_in = ((within_row >= 0) & (row < gradient.shape[2]))[:, None] & (
                    (within_column >= 0) & (column < gradient.shape[3])
                )
                row, column = row.clamp(max=gradient.shape[2] - 1)[:, None], column.clamp(max=gradient.shape[3] - 1)
                is_maximum = lies_in & (chosen[:, :, row, column] == 3 * within_row[:, None] + within_column)
                part = torch.where(is_maximum, gradient[:, :, row, column].to(wide), 0)
                total = part if total is None else total + part
        assert total is not None
        return total.to(gradient.dtype)
