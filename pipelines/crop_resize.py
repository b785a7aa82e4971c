"""Cut boxes out of images of any size and resize them as PIL does, bit for bit: bilinear, antialiased.

On CPUs `crop_resize_numba` does it and on GPUs `crop_resize_triton`, both exact for boxes of any size; what is here
runs on any device, is what they are tested beside, and takes over, many times slower, where one of them is missing.

PIL resizes in two passes, horizontal then vertical (from Pillow 13 on the other way round where a box shrinks more in
height), and rounds to uint8 in between; each pass is a product with a banded matrix of fixed-point weights. Here both
are batched matrix products with one matrix per box, so that boxes of many sizes become one launch. The weights are
split in two halves of 11 bits: every product and sum is then an integer that float32 holds exactly, TF32 or not.
Legend: M boxes, S side of the output, h x w the largest box of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.config import ViewConfig
from pipelines.crops import squashed
from pipelines.kernels import Impl, Kernels

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
_WEIGHT_BITS = 22  # PIL's, after the binary point
_LOW_BITS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedImages:
    """Decoded images of any size in one buffer.

    The geometry stays on the host, where the boxes are drawn; only pixels live on the device.
    """

    pixels: Tensor
    """uint8 [total bytes], each image as [height, width, 3] RGB, or as [3, height, width] where `planar`."""
    offsets: npt.NDArray[np.int64]
    """int64 [N]: first byte of each image."""
    heights: npt.NDArray[np.int64]
    """int64 [N], pixels."""
    widths: npt.NDArray[np.int64]
    """int64 [N], pixels."""
    planar: bool = False

    @classmethod
    def side_by_side(
        cls, pixels: Tensor, heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], *, planar: bool = False
    ) -> PackedImages:
        """Images that lie behind one another without gaps."""
        sizes = 3 * heights * widths
        return cls(pixels=pixels, offsets=np.cumsum(sizes) - sizes, heights=heights, widths=widths, planar=planar)

    def __len__(self) -> int:
        return len(self.offsets)


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
    around a resized box. impl: `auto` takes numba on a CPU, triton on a GPU, and torch elsewhere or where they do not
    work. num_threads: numba's; by default as many as torch's.
    Equals ``PIL.Image.crop(...)``, resized with ``BILINEAR`` to the new width, then to the new height, and then cut.
    (By torch, sums over more than 60 source pixels are no longer exact, so that a single pixel may be one level off.)
    Raises ValueError for a box that is not inside its image, and if numba or triton cannot be used where it is asked
    for.
    """
    boxes = squashed(boxes, output_size) if boxes.shape[1] == 4 else boxes
    _require_boxes_inside(images, rows, boxes)
    chosen = _KERNELS.choose(impl, {"images": images.pixels}, _what_compiled_code_cannot_take(images.pixels))
    if chosen == "triton":
        from pipelines.crop_resize_triton import crop_resize_triton

        return crop_resize_triton(images, rows, boxes, output_size, fill)
    if chosen == "numba":
        from pipelines.crop_resize_numba import crop_resize_numba

        return crop_resize_numba(images, rows, boxes, output_size, fill, num_threads or torch.get_num_threads())
    return _crop_resize_torch(images, rows, boxes, output_size, fill)


def _require_boxes_inside(images: PackedImages, rows: npt.NDArray[np.int64], boxes: npt.NDArray[np.int32]) -> None:
    """Compiled code would read whatever is there."""
    heights, widths, offsets = images.heights[rows], images.widths[rows], images.offsets[rows]
    top, left, height, width, new_height, new_width, *_ = boxes.astype(np.int64).T
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0) & (new_height > 0) & (new_width > 0)
    inside &= (top + height <= heights) & (left + width <= widths)
    if not inside.all():
        wrong = int(np.argmin(inside))
        raise ValueError(
            f"box {wrong} is {boxes[wrong, :4].tolist()} as (top, left, height, width), and its image is "
            f"{heights[wrong]} x {widths[wrong]} pixels: a box lies inside its image and has at least one pixel"
        )
    buffer = images.pixels.numel()
    in_buffer = (offsets >= 0) & (offsets + 3 * heights * widths <= buffer)
    if not in_buffer.all():
        wrong = int(np.argmin(in_buffer))
        raise ValueError(
            f"image {rows[wrong]} of {heights[wrong]} x {widths[wrong]} pixels at byte {offsets[wrong]} does not end "
            f"within the buffer of {buffer} bytes: offsets, heights and widths describe the images as they are packed"
        )


def _what_compiled_code_cannot_take(pixels: Tensor) -> str | None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or not pixels.is_contiguous():
        shape, strides = list(pixels.shape), list(pixels.stride())
        return f"it takes one row of uint8 without gaps, and this is {pixels.dtype} {shape} of strides {strides}"
    return None


def _try_numba() -> None:
    from pipelines.crop_resize_numba import compiled_kernel

    compiled_kernel()


def _try_triton(device: torch.device) -> None:
    from pipelines.crop_resize_triton import crop_resize_triton

    zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    pixel = PackedImages.side_by_side(torch.zeros(3, dtype=torch.uint8, device=device), one, one)
    crop_resize_triton(pixel, zero, np.array([[0, 0, 1, 1, 2, 2, 0, 0]], dtype=np.int32), 2, (0, 0, 0))


_KERNELS = Kernels(verb="resize", done="resized", try_numba=_try_numba, try_triton=_try_triton)


def _crop_resize_torch(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    fill: tuple[int, int, int],
) -> Tensor:
    device = images.pixels.device
    output = torch.empty(len(rows), output_size, output_size, 3, dtype=torch.uint8, device=device)
    for chunk in _chunks_of_similar_size(boxes, output_size, _CHUNK_ELEMENTS.get(device.type, 1 << 24)):
        strides = _strides(images, rows[chunk])
        geometry = np.concatenate((images.offsets[rows[chunk], None], strides, boxes[chunk].astype(np.int64)), axis=1)
        height, width = (int(side) for side in boxes[chunk, 2:4].max(axis=0))
        table = torch.from_numpy(geometry).to(device, non_blocking=True)
        resized = _resize_chunk(images.pixels, table, height, width, output_size)
        if (boxes[chunk, 6:] < 0).any():
            place = torch.arange(output_size, device=device) + table[:, 10:, None]  # [M, 2, S]
            inside = (place >= 0) & (place < table[:, 8:10, None])
            inside = inside[:, 0, :, None, None] & inside[:, 1, None, :, None]
            resized = torch.where(inside, resized, torch.tensor(fill, dtype=torch.uint8, device=device))
        output[torch.from_numpy(chunk).to(device, non_blocking=True)] = resized
    return output


def _strides(images: PackedImages, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes from a row, a column and a channel to the next: int64 [M, 3]."""
    heights, widths, ones = images.heights[rows], images.widths[rows], np.ones_like(rows)
    if images.planar:
        return np.stack((widths, ones, heights * widths), axis=1)
    return np.stack((3 * widths, 3 * ones, ones), axis=1)


def _resize_chunk(pixels: Tensor, geometry: Tensor, height: int, width: int, output_size: int) -> Tensor:
    """geometry: int64 [M, 12]: offset, strides of a row, a column and a channel, and the placed box."""
    offset, row_stride, column_stride, channel_stride, top, left, box_height, box_width, *placed = geometry.unbind(1)
    new_height, new_width, first_row, first_column = placed
    row = torch.arange(height, device=pixels.device).minimum(box_height[:, None] - 1)  # [M, h]: repeats the last row
    column = torch.arange(width, device=pixels.device).minimum(box_width[:, None] - 1)  # [M, w]
    row_start = offset[:, None] + (top[:, None] + row) * row_stride[:, None]  # [M, h]
    channel_start = torch.arange(3, device=pixels.device) * channel_stride[:, None]  # [M, 3]
    column_start = (left[:, None] + column) * column_stride[:, None]  # [M, w]
    position = row_start[:, :, None, None] + channel_start[:, None, :, None] + column_start[:, None, None, :]
    crops = pixels.take(position).float().flatten(1, 2)  # [M, h, 3, w] -> [M, 3h, w]

    high, low = _resize_weights(box_width, new_width, first_column, width, output_size)  # [M, S, w]
    narrow = _rounded(crops @ high.mT, crops @ low.mT).float()  # [M, 3h, S]
    narrow = narrow.unflatten(1, (height, 3)).flatten(2)  # [M, h, 3S]
    high, low = _resize_weights(box_height, new_height, first_row, height, output_size)  # [M, S, h]
    resized = _rounded(high @ narrow, low @ narrow).to(torch.uint8)  # [M, S, 3S]
    return resized.unflatten(2, (3, output_size)).transpose(2, 3)


def _resize_weights(
    box_size: Tensor, new_size: Tensor, first: Tensor, max_size: int, output_size: int
) -> tuple[Tensor, Tensor]:
    """PIL's triangle filter: the weight of each source pixel in each output pixel, in units of 2**-22.

    box_size, new_size, first: [M]: a box is resized to `new_size`, whose pixels from `first` on are the output's.
    Returns its high part (over 2**11, 0 to 2**11) and its low part (-2**10 to 2**10): float32 [M, S, max_size] each.
    """
    box, new = box_size[:, None, None], new_size[:, None, None]
    place = torch.arange(output_size, device=box.device)[:, None] + first[:, None, None]  # [M, S, 1]
    center = (2 * place + 1) * box
    source = torch.arange(1, 2 * max_size, 2, device=box.device) * new
    # Distances and the triangle's half width, times twice the new size: integers.
    weights = (2 * torch.maximum(box, new) - (source - center).abs_()).clamp_(min=0).double()
    weights.mul_(torch.arange(max_size, device=box.device) < box)
    weights.div_(weights.sum(dim=2, keepdim=True).clamp_(min=1)).mul_(2**_WEIGHT_BITS).add_(0.5).floor_()
    high = (weights * 2.0**-_LOW_BITS).round_()
    low = weights.sub_(high, alpha=2**_LOW_BITS)
    return high.float(), low.float()


def _rounded(high: Tensor, low: Tensor) -> Tensor:
    """Sums of both parts of the weights times uint8 values, put together and rounded: int32, 0 to 255."""
    total = high.to(torch.int32).mul_(2**_LOW_BITS).add_(low.to(torch.int32))
    return total.add_(2 ** (_WEIGHT_BITS - 1)).bitwise_right_shift_(_WEIGHT_BITS)


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
