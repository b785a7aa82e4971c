"""Crop boxes in pixels, torchvision's algorithms vectorised, and where a view lies in its resized box.

A box is int32 (top, left, height, width). A placed box has four more columns, (height, width, top, left): the box is
resized to that height and width, and the view is the square whose upper left corner is there; a view that is larger
than its resized box is filled around it. All are whole pixels, as Pillow's `resize` and `crop` take them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipelines.counter_rng import uniform

Boxes = npt.NDArray[np.int32]
Sizes = npt.NDArray[np.int64]

_NUM_ATTEMPTS = 10


def random_resized_crop_boxes(
    heights: Sizes,
    widths: Sizes,
    draws: npt.NDArray[np.float64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Boxes:
    """``torchvision.transforms.RandomResizedCrop.get_params`` for a whole batch.

    heights, widths: int64 [B], pixels. draws: float64 [B, 40] in [0, 1): for each of ten attempts (area, log aspect
    ratio, top, left). scale: range of the crop's share of the image area; ratio: range of width / height.
    The first attempt that fits is taken, else the largest central crop within the ratio range.
    """
    height = heights[:, None].astype(np.float64)
    width = widths[:, None].astype(np.float64)
    area_draw, ratio_draw, top_draw, left_draw = (draws.reshape(-1, _NUM_ATTEMPTS, 4)[..., k] for k in range(4))
    target_area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio_draw)
    crop_width = np.rint(np.sqrt(target_area * aspect))
    crop_height = np.rint(np.sqrt(target_area / aspect))
    top = np.floor(top_draw * (height - crop_height + 1))
    left = np.floor(left_draw * (width - crop_width + 1))
    attempts = np.stack((top, left, crop_height, crop_width), axis=-1)

    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first_fit = np.argmax(fits, axis=1)
    boxes = attempts[np.arange(len(draws)), first_fit]
    boxes = np.where(fits.any(axis=1, keepdims=True), boxes, _central_fallback(heights, widths, ratio))
    return boxes.astype(np.int32)


def random_resized_crop_draws(
    seed: int, epoch: int, indices: npt.NDArray[np.int64], stream: int
) -> npt.NDArray[np.float64]:
    """The draws that `random_resized_crop_boxes` consumes: float64 [B, 40]; attempt k is Philox block k."""
    return uniform(seed, epoch, indices, stream, 4 * _NUM_ATTEMPTS)


def full_image_boxes(heights: Sizes, widths: Sizes) -> Boxes:
    """The whole image, uncropped. heights, widths: int64 [B]. Returns int32 [B, 4]."""
    zeros = np.zeros_like(heights)
    return np.stack((zeros, zeros, heights, widths), axis=-1).astype(np.int32)


def squashed(boxes: Boxes, view_size: int) -> Boxes:
    """Boxes [..., 4] resized to the view, whatever their aspect: placed boxes [..., 8]."""
    placed = np.zeros((*boxes.shape[:-1], 8), dtype=np.int32)
    placed[..., :4], placed[..., 4:6] = boxes, view_size
    return placed


def center_crops(heights: Sizes, widths: Sizes, view_size: int, shorter_side: int) -> Boxes:
    """``Resize(shorter_side)``, then ``CenterCrop(view_size)`` of torchvision: placed boxes [B, 8].

    heights, widths: int64 [B]. shorter_side: at least view_size.
    """
    return _scaled(heights, widths, shorter_side, np.minimum(heights, widths), view_size)


def padded(heights: Sizes, widths: Sizes, view_size: int) -> Boxes:
    """The whole image, its longer side resized to the view, in the middle of it: placed boxes [B, 8]."""
    return _scaled(heights, widths, view_size, np.maximum(heights, widths), view_size)


def _scaled(heights: Sizes, widths: Sizes, new_side: int, side: Sizes, view_size: int) -> Boxes:
    """The whole image with one of its sides resized to ``new_side``, the other rounded down as torchvision does."""
    resized = np.stack([np.maximum(1, new_side * own // side) for own in (heights, widths)], axis=-1)
    room = resized - view_size
    corner = np.where(room >= 0, np.rint(room / 2), -(-room // 2))
    return np.concatenate((full_image_boxes(heights, widths), resized, corner), axis=-1).astype(np.int32)


def _central_fallback(heights: Sizes, widths: Sizes, ratio: tuple[float, float]) -> npt.NDArray[np.float64]:
    image_ratio = widths / heights
    crop_height = np.where(image_ratio < ratio[0], np.rint(widths / ratio[0]), heights)
    crop_width = np.where(image_ratio > ratio[1], np.rint(heights * ratio[1]), widths)
    # An image one pixel wide and very long would round to a crop of height 0 on the other side of the ratio.
    crop_height = np.clip(crop_height, 1, heights)
    crop_width = np.clip(crop_width, 1, widths)
    return np.stack(((heights - crop_height) // 2, (widths - crop_width) // 2, crop_height, crop_width), axis=-1)
