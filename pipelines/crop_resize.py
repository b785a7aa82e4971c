"""Cut boxes out of images of any size and resize them as PIL does, bit for bit: bilinear, antialiased.

On CPUs `crop_resize_numba` does it and on GPUs `crop_resize_triton`; what is here runs on any device, and takes over,
many times slower, where one of them is missing.

PIL resizes in two passes, horizontal then vertical (from Pillow 13 on the other way round where a box shrinks more in
height), and rounds to uint8 in between; each pass is a product with a banded matrix of fixed-point weights.
Legend: M boxes, S side of the output, h x w a box.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.config import ViewConfig
from pipelines.crops import squashed
from pipelines.kernels import Impl, automatic_impl
from pipelines.packed_images import PackedImages

_WEIGHT_BITS = 22  # PIL's, after the binary point


def cut_views(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    config: ViewConfig,
    *,
    num_threads: int | None = None,
) -> Tensor:
    """All views of some images: uint8 [B, V, S, S, 3]; see `crop_resize`.

    rows: int64 [B], which images. boxes: int32 [B, V, 8].
    """
    num_views, boxes = boxes.shape[1], boxes.reshape(-1, boxes.shape[-1])
    repeated = np.repeat(rows, num_views)
    crops = crop_resize(images, repeated, boxes, config.image_size, fill=config.fill, num_threads=num_threads)
    return crops.unflatten(0, (len(rows), num_views))


def crop_resize(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    *,
    fill: tuple[int, int, int] = (0, 0, 0),
    impl: Impl = "auto",
    num_threads: int | None = None,
) -> Tensor:
    """Each box of its image as a square of ``output_size`` pixels: uint8 [M, S, S, 3] on the images' device.

    rows: int64 [M], which image. boxes: int32 [M, 8], placed boxes of `pipelines.crops`, or [M, 4], squashed. fill: RGB
    around a resized box. impl: `auto` takes numba on a CPU, triton on a GPU, and torch elsewhere, where they do not
    work, and for planar images on a CPU, which no loader makes. num_threads: numba's; by default as many as torch's.
    Equals ``PIL.Image.crop(...)``, resized with ``BILINEAR`` to the new width, then to the new height, and then cut.
    """
    boxes = squashed(boxes, output_size) if boxes.shape[1] == 4 else boxes
    assert _boxes_are_inside(images, rows, boxes)
    if impl == "auto":
        impl = automatic_impl(images.pixels.device, "resized", _resize_a_pixel)
        impl = "torch" if images.planar and impl == "numba" else impl
    if impl == "triton":
        from pipelines.crop_resize_triton import crop_resize_triton

        return crop_resize_triton(images, rows, boxes, output_size, fill)
    if impl == "numba":
        from pipelines.crop_resize_numba import crop_resize_numba

        return crop_resize_numba(images, rows, boxes, output_size, fill, num_threads or torch.get_num_threads())
    return _crop_resize_torch(images, rows, boxes, output_size, fill)


def _boxes_are_inside(images: PackedImages, rows: npt.NDArray[np.int64], boxes: npt.NDArray[np.int32]) -> bool:
    """Whether each box has a pixel and lies in its image, and that in the buffer: compiled code reads what is there."""
    heights, widths, offsets = images.heights[rows], images.widths[rows], images.offsets[rows]
    top, left, height, width, new_height, new_width, *_ = boxes.astype(np.int64).T
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0) & (new_height > 0) & (new_width > 0)
    inside &= (top + height <= heights) & (left + width <= widths)
    inside &= (offsets >= 0) & (offsets + 3 * heights * widths <= images.pixels.numel())
    return bool(inside.all())


def _resize_a_pixel(impl: Impl, device: torch.device) -> None:
    zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    pixel = PackedImages.side_by_side(torch.zeros(3, dtype=torch.uint8, device=device), one, one)
    crop_resize(pixel, zero, np.array([[0, 0, 1, 1]], dtype=np.int32), 2, impl=impl)


def _crop_resize_torch(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    fill: tuple[int, int, int],
) -> Tensor:
    """Box by box, as two products with matrices of PIL's weights: float64 holds every sum of them exactly."""
    device = images.pixels.device
    output = torch.tensor(fill, dtype=torch.uint8, device=device).repeat(len(rows), output_size, output_size, 1)
    for view, row, box in zip(output, rows.tolist(), boxes.tolist(), strict=True):
        top, left, height, width, new_height, new_width, first_row, first_column = box
        image_height, image_width, first = (int(of[row]) for of in (images.heights, images.widths, images.offsets))
        image = images.pixels[first : first + 3 * image_height * image_width]
        if images.planar:
            image = image.view(3, image_height, image_width)
        else:
            image = image.view(image_height, image_width, 3).permute(2, 0, 1)
        crop = image[:, top : top + height, left : left + width].double()  # [3, h, w]
        # What the resized box covers of the output.
        upper, lower = max(0, -first_row), min(output_size, new_height - first_row)
        begin, end = max(0, -first_column), min(output_size, new_width - first_column)
        across = _resize_weights(width, new_width, range(first_column + begin, first_column + end), device)
        down = _resize_weights(height, new_height, range(first_row + upper, first_row + lower), device)
        resized = _rounded(down @ _rounded(crop @ across.mT))  # [3, S, S], or less
        view[upper:lower, begin:end] = resized.permute(1, 2, 0)
    return output


def _resize_weights(size: int, new_size: int, places: range, device: torch.device) -> Tensor:
    """PIL's triangle filter: the weight of each source pixel in some resized ones, in units of 2**-22: [S, size]."""
    center = (2 * torch.arange(places.start, places.stop, device=device, dtype=torch.float64)[:, None] + 1) * size
    source = (2 * torch.arange(size, device=device, dtype=torch.float64) + 1) * new_size
    # Distances and the triangle's half width, times twice the new size: integers.
    weights = (2 * max(size, new_size) - (source - center).abs()).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True) * 2**_WEIGHT_BITS + 0.5).floor()


def _rounded(total: Tensor) -> Tensor:
    """Sums of weights times pixels as pixels again."""
    return (total / 2**_WEIGHT_BITS + 0.5).floor()
