"""Cut boxes out of images of any size and resize them as PIL does: bilinear, antialiased, on any device.

PIL resizes in two passes, horizontal then vertical, and rounds to uint8 in between; each pass is a product with a
banded weight matrix. Here both are batched matrix products with one matrix per box, so that boxes of many sizes
become one launch. Legend: M boxes, S side of the output, h x w the largest box of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
_ROUNDING_SLACK = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedImages:
    """Decoded images of any size behind one another in one buffer.

    The geometry stays on the host, where the boxes are drawn; only pixels live on the device.
    """

    pixels: Tensor
    """uint8 [total bytes], each image as [height, width, 3] RGB."""
    offsets: npt.NDArray[np.int64]
    """int64 [N]: first byte of each image."""
    heights: npt.NDArray[np.int64]
    """int64 [N], pixels."""
    widths: npt.NDArray[np.int64]
    """int64 [N], pixels."""

    def __len__(self) -> int:
        return len(self.offsets)


def crop_resize(
    images: PackedImages, rows: npt.NDArray[np.int64], boxes: npt.NDArray[np.int32], output_size: int
) -> Tensor:
    """Each box of its image as a square of ``output_size`` pixels: uint8 [M, S, S, 3] on the images' device.

    rows: int64 [M], which image. boxes: int32 [M, 4] as (top, left, height, width), inside the image.
    Equals ``PIL.Image.crop(...).resize(..., BILINEAR)`` to one level of 255.
    """
    device = images.pixels.device
    output = torch.empty(len(rows), output_size, output_size, 3, dtype=torch.uint8, device=device)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    for chunk in _chunks_of_similar_size(boxes, output_size, _CHUNK_ELEMENTS.get(device.type, 1 << 24)):
        geometry = np.concatenate(
            (images.offsets[rows[chunk], None], images.widths[rows[chunk], None], boxes[chunk].astype(np.int64)), axis=1
        )
        height, width = (int(side) for side in boxes[chunk, 2:].max(axis=0))
        resized = _resize_chunk(
            images.pixels, torch.from_numpy(geometry).to(device, non_blocking=True), height, width, output_size, dtype
        )
        output[torch.from_numpy(chunk).to(device, non_blocking=True)] = resized
    return output


def _resize_chunk(
    pixels: Tensor, geometry: Tensor, height: int, width: int, output_size: int, dtype: torch.dtype
) -> Tensor:
    offset, image_width, top, left, box_height, box_width = geometry.unbind(1)  # int64 [M] each
    row = torch.arange(height, device=pixels.device).minimum(box_height[:, None] - 1)  # [M, h]: repeats the last row
    column = torch.arange(width, device=pixels.device).minimum(box_width[:, None] - 1)  # [M, w]
    row_start = offset[:, None] + ((top[:, None] + row) * image_width[:, None] + left[:, None]) * 3  # [M, h]
    channel = torch.arange(3, device=pixels.device)
    position = row_start[:, None, :, None] + (column * 3)[:, None, None, :] + channel[:, None, None]  # [M, 3, h, w]
    crops = pixels.take(position).to(dtype)

    horizontal = _resize_weights(box_width, width, output_size, dtype)  # [M, S, w]
    vertical = _resize_weights(box_height, height, output_size, dtype)  # [M, S, h]
    narrow = torch.bmm(crops.flatten(1, 2), horizontal.mT)  # [M, 3h, S]
    narrow = _round_half_up(narrow).unflatten(1, (3, height))
    resized = _round_half_up(torch.matmul(vertical[:, None], narrow))  # [M, 3, S, S]
    return resized.to(torch.uint8).permute(0, 2, 3, 1)


def _resize_weights(box_size: Tensor, max_size: int, output_size: int, dtype: torch.dtype) -> Tensor:
    """Weights of each source pixel in each output pixel, [M, S, max_size]: PIL's triangle filter, rows sum to one."""
    scale = (box_size.to(dtype) / output_size)[:, None, None]
    center = (torch.arange(output_size, device=box_size.device, dtype=dtype)[:, None] + 0.5) * scale
    source = torch.arange(max_size, device=box_size.device)
    weights = (source.to(dtype) + 0.5) - center
    weights = weights.abs_().mul_(-1 / scale.clamp(min=1.0)).add_(1.0).clamp_(min=0.0)
    weights.mul_(source < box_size[:, None, None])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _round_half_up(values: Tensor) -> Tensor:
    # An exact half is common when a side is halved; the slack sends it up whatever the order of summation.
    return values.add_(0.5 + _ROUNDING_SLACK[values.dtype]).floor_().clamp_(0, 255)


def _chunks_of_similar_size(
    boxes: npt.NDArray[np.int32], output_size: int, max_elements: int
) -> list[npt.NDArray[np.int64]]:
    """Rows grouped so that little of a chunk is padding and its largest array stays under ``max_elements``."""
    order = np.lexsort((boxes[:, 3], boxes[:, 2]))
    chunks: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        end, height, width = start, 0, 0
        while end < len(order):
            height, width = max(height, int(boxes[order[end], 2])), max(width, int(boxes[order[end], 3]))
            per_box = 3 * max(height, output_size) * max(width, output_size)
            if end > start and (end + 1 - start) * per_box > max_elements:
                break
            end += 1
        chunks.append(order[start:end])
        start = end
    return chunks
