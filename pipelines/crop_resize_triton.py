"""`crop_resize` for GPUs, in Triton: PIL's fixed-point arithmetic in three launches a batch, whatever the boxes' sizes.

1. The weights of both filters: 22 bits each, once for each box, from integers and one float64 division.
2. Horizontal: each row of a box becomes S pixels, rounded to uint8, in scratch memory.
3. Vertical: the columns of the scratch become the output.

A lane is one channel of one pixel, so that interleaved and planar images go the same way. Sums are int32 and exact.
It has run in Triton's interpreter and was compiled for GPUs, but never ran on one.
Legend: M boxes, S side of the output, h x w a box, T taps: source pixels that an output pixel is made of, at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.kernels import Argument, KernelLaunch
from pipelines.packed_images import PackedImages

_TILE_ROWS, _MAX_TILE_LANES = 16, 128
_SCRATCH_BYTES = 1 << 29  # at most, unless a single box needs more
_ALIGNMENT = tl.constexpr(16)  # bytes, of rows in the scratch


def crop_resize_triton(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    fill: tuple[int, int, int],
) -> Tensor:
    """`pipelines.crop_resize.crop_resize` for pixels on a GPU and boxes that are inside their images.

    Nothing is waited for.
    """
    device = images.pixels.device
    output = torch.empty((len(rows), output_size, output_size, 3), dtype=torch.uint8, device=device)
    with torch.cuda.device_of(images.pixels):
        for launch in launches(images, rows, boxes, output, fill):
            launch.run()
    return output


def launches(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output: Tensor,
    fill: tuple[int, int, int],
) -> Iterator[KernelLaunch]:
    """The launches that fill ``output`` uint8 [M, S, S, 3], in order: three for as many boxes as the scratch holds."""
    size, device = output.shape[1], output.device
    if output.numel() == 0:
        return
    geometry = _geometry(images, rows, boxes)
    colour = dict(zip(("fill_red", "fill_green", "fill_blue"), fill, strict=True))
    pitch = triton.cdiv(3 * size, _ALIGNMENT.value) * _ALIGNMENT.value
    scratch_bytes = geometry[:, _HEIGHT.value] * pitch
    num_weights = (geometry[:, [_HEIGHT_TAPS.value, _WIDTH_TAPS.value]] + 1).sum(axis=1) * size
    for first, stop in _chunks(scratch_bytes):
        ends = np.stack((scratch_bytes[first:stop] // _ALIGNMENT.value, num_weights[first:stop]), axis=1).cumsum(axis=0)
        places = np.concatenate((np.zeros((1, 2), dtype=np.int64), ends[:-1]))
        table = torch.from_numpy(np.concatenate((geometry[first:stop], places), axis=1))
        if device.type == "cuda":
            table = table.pin_memory()  # else the copy would wait
        buffers: dict[str, Argument] = {
            "pixels": images.pixels,
            "geometry": table.to(device, non_blocking=True),
            "weights": torch.empty(int(ends[-1, 1]), dtype=torch.int32, device=device),
            "scratch": torch.empty(int(ends[-1, 0]) * _ALIGNMENT.value, dtype=torch.uint8, device=device),
            "output": output[first:stop],
        }
        max_height = int(geometry[first:stop, _HEIGHT.value].max())
        yield from _launches_of_a_chunk(buffers, colour, stop - first, size, pitch, max_height, images.planar)


def _geometry(images: PackedImages, rows: npt.NDArray[np.int64], boxes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """int64 [M, 11]: the columns that the kernels know, up to ``_CORNER_COLUMN``."""
    heights, widths = images.heights[rows], images.widths[rows]
    top, left, *sides = boxes[:, :4].astype(np.int64).T
    placed = boxes[:, 4:].astype(np.int64).T
    pixel = 1 if images.planar else 3  # bytes from a column to the next
    first = images.offsets[rows] + (top * widths + left) * pixel
    channel_stride = heights * widths if images.planar else np.ones_like(heights)
    taps = (np.minimum(old, -(-2 * np.maximum(old, new) // new)) for old, new in zip(sides, placed, strict=False))
    return np.stack((first, widths * pixel, channel_stride, *sides, *taps, *placed), axis=1)


def _chunks(scratch_bytes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, stop) of boxes whose scratch is at most `_SCRATCH_BYTES`, or of a single one."""
    ends = scratch_bytes.cumsum()
    first = 0
    while first < len(ends):
        limit = ends[first] - scratch_bytes[first] + _SCRATCH_BYTES
        stop = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        yield first, stop
        first = stop


def _launches_of_a_chunk(
    buffers: dict[str, Argument],
    colour: dict[str, int],
    count: int,
    size: int,
    pitch: int,
    max_height: int,
    planar: bool,
) -> Iterator[KernelLaunch]:
    tile_lanes = min(_MAX_TILE_LANES, triton.next_power_of_2(3 * size))
    tiles = triton.cdiv(size, tile_lanes)
    yield KernelLaunch(
        kernel=_crop_resize_weights,
        grid=(count * 2 * tiles,),
        arguments={name: buffers[name] for name in ("geometry", "weights")} | {"size": size, "tiles": tiles},
        constants={"TILE": tile_lanes},
    )
    across = triton.cdiv(3 * size, tile_lanes)
    tile = {"TILE_ROWS": _TILE_ROWS, "TILE_LANES": tile_lanes}
    steps: tuple[tuple[Any, tuple[str, str], int, dict[str, int]], ...] = (
        (_crop_resize_rows, ("pixels", "scratch"), max_height, {"column_stride": 1 if planar else 3}),
        (_crop_resize_columns, ("scratch", "output"), size, colour),
    )
    for kernel, ends, num_rows, more in steps:
        down = triton.cdiv(num_rows, _TILE_ROWS)
        yield KernelLaunch(
            kernel=kernel,
            grid=(count * down * across,),
            arguments={name: buffers[name] for name in (*ends, "geometry", "weights")}
            | {"size": size, "pitch": pitch, "down": down, "across": across}
            | more,
            constants=tile,
        )


# Columns of the geometry. Places are a box's own parts of the buffers: of the scratch in units of _ALIGNMENT, so that
# the compiler sees that its rows begin at whole words.
_FIRST = tl.constexpr(0)  # byte of the box
_ROW_STRIDE = tl.constexpr(1)
_CHANNEL_STRIDE = tl.constexpr(2)
_HEIGHT = tl.constexpr(3)
_WIDTH = tl.constexpr(4)
_HEIGHT_TAPS = tl.constexpr(5)
_WIDTH_TAPS = tl.constexpr(6)
_NEW_HEIGHT = tl.constexpr(7)
_NEW_WIDTH = tl.constexpr(8)
_CORNER_ROW = tl.constexpr(9)
_CORNER_COLUMN = tl.constexpr(10)
_SCRATCH_PLACE = tl.constexpr(11)
_WEIGHTS_PLACE = tl.constexpr(12)
_COLUMNS = tl.constexpr(13)

_BITS = tl.constexpr(22)  # of a weight, after the binary point
_HALF = tl.constexpr(1 << 21)


@triton.jit
def _crop_resize_weights(geometry, weights, size, tiles, TILE: tl.constexpr):
    """PIL's triangle filter. Of a box's width: the first source pixel of each output pixel [S], then the weights of it
    and those that follow [T, S], 0 where there are none; then the same of its height.
    """
    box = (tl.program_id(0) // (2 * tiles)).to(tl.int64)
    axis = (tl.program_id(0) // tiles) % 2
    row = geometry + box * _COLUMNS
    extent = tl.load(row + (_WIDTH - axis))
    taps = tl.load(row + (_WIDTH_TAPS - axis)).to(tl.int32)
    target = weights + tl.load(row + _WEIGHTS_PLACE) + axis * (1 + tl.load(row + _WIDTH_TAPS)) * size
    numbers = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    is_number = numbers < size
    new = tl.load(row + (_NEW_WIDTH - axis))
    # Outside the resized box, the nearest pixel in it stands in. Distances and the triangle's half width, times twice
    # the new size: integers.
    center = (2 * tl.minimum(tl.maximum(numbers + tl.load(row + (_CORNER_COLUMN - axis)), 0), new - 1) + 1) * extent
    half_width = 2 * tl.maximum(extent, new)
    start = tl.maximum(center - half_width + new, 0) // (2 * new)
    tl.store(target + numbers, start.to(tl.int32), mask=is_number)
    first_distance = (2 * start + 1) * new - center
    total = tl.zeros([TILE], tl.float64)
    for tap in range(0, taps):
        total += _height_of_triangle(first_distance, start, tap, half_width, extent, new)
    for tap in range(0, taps):
        share = _height_of_triangle(first_distance, start, tap, half_width, extent, new) / total
        weight = (share * 4194304.0 + 0.5).to(tl.int32)
        tl.store(target + (tap + 1) * size + numbers, weight, mask=is_number)


@triton.jit
def _height_of_triangle(first_distance, start, tap, half_width, extent, new):
    height = tl.maximum(half_width - tl.abs(first_distance + 2 * tap * new), 0)
    return tl.where(start + tap < extent, height, 0).to(tl.float64)


@triton.jit(do_not_specialize=["down"])  # which differs from batch to batch
def _crop_resize_rows(
    pixels, scratch, geometry, weights, size, pitch, down, across, column_stride,
    TILE_ROWS: tl.constexpr, TILE_LANES: tl.constexpr,
):  # fmt: skip
    """Rows of a box, of S pixels each, to the scratch [h, pitch]."""
    box = (tl.program_id(0) // (down * across)).to(tl.int64)
    row = geometry + box * _COLUMNS
    height = tl.load(row + _HEIGHT).to(tl.int32)
    first_y = (tl.program_id(0) // across) % down * TILE_ROWS
    if first_y < height:
        lanes = (tl.program_id(0) % across) * TILE_LANES + tl.arange(0, TILE_LANES)
        is_lane = lanes < 3 * size
        x = lanes // 3
        y = first_y + tl.arange(0, TILE_ROWS)
        is_row = y < height
        table = weights + tl.load(row + _WEIGHTS_PLACE) + x
        start = tl.load(table, mask=is_lane, other=0)
        room = tl.load(row + _WIDTH).to(tl.int32) - start  # taps before the end of the box
        channel_place = (lanes % 3) * tl.load(row + _CHANNEL_STRIDE)
        row_place = tl.load(row + _FIRST) + y * tl.load(row + _ROW_STRIDE)
        source = pixels + row_place[:, None] + (channel_place + start * column_stride)[None, :]
        total = tl.full([TILE_ROWS, TILE_LANES], _HALF, tl.int32)
        for tap in range(0, tl.load(row + _WIDTH_TAPS).to(tl.int32)):
            weight = tl.load(table + (tap + 1) * size, mask=is_lane, other=0)
            is_inside = is_row[:, None] & (is_lane & (tap < room))[None, :]
            value = tl.load(source + tap * column_stride, mask=is_inside, other=0)
            total += value.to(tl.int32) * weight[None, :]
        target = scratch + tl.load(row + _SCRATCH_PLACE) * _ALIGNMENT + y.to(tl.int64)[:, None] * pitch + lanes[None, :]
        tl.store(target, (total >> _BITS).to(tl.uint8), mask=is_row[:, None] & is_lane[None, :])


@triton.jit
def _crop_resize_columns(
    scratch, output, geometry, weights, size, pitch, down, across, fill_red, fill_green, fill_blue,
    TILE_ROWS: tl.constexpr, TILE_LANES: tl.constexpr,
):  # fmt: skip
    """From the scratch to the output [M, S, 3 S], filled around the resized box."""
    box = (tl.program_id(0) // (down * across)).to(tl.int64)
    row = geometry + box * _COLUMNS
    lanes = (tl.program_id(0) % across) * TILE_LANES + tl.arange(0, TILE_LANES)
    is_lane = lanes < 3 * size
    y = (tl.program_id(0) // across) % down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = y < size
    table = weights + tl.load(row + _WEIGHTS_PLACE) + (1 + tl.load(row + _WIDTH_TAPS)) * size + y
    start = tl.load(table, mask=is_row, other=0)
    room = tl.load(row + _HEIGHT).to(tl.int32) - start
    source = scratch + tl.load(row + _SCRATCH_PLACE) * _ALIGNMENT
    source += start.to(tl.int64)[:, None] * pitch + lanes[None, :]
    total = tl.full([TILE_ROWS, TILE_LANES], _HALF, tl.int32)
    for tap in range(0, tl.load(row + _HEIGHT_TAPS).to(tl.int32)):
        weight = tl.load(table + (tap + 1) * size, mask=is_row, other=0)
        is_inside = (is_row & (tap < room))[:, None] & is_lane[None, :]
        value = tl.load(source, mask=is_inside, other=0)
        total += value.to(tl.int32) * weight[:, None]
        source += pitch
    place_y, place_x = y + tl.load(row + _CORNER_ROW), lanes // 3 + tl.load(row + _CORNER_COLUMN)
    is_row_of_box = (place_y >= 0) & (place_y < tl.load(row + _NEW_HEIGHT))
    is_lane_of_box = (place_x >= 0) & (place_x < tl.load(row + _NEW_WIDTH))
    fill = tl.where(lanes % 3 == 0, fill_red, tl.where(lanes % 3 == 1, fill_green, fill_blue))
    value = tl.where(is_row_of_box[:, None] & is_lane_of_box[None, :], total >> _BITS, fill[None, :])
    target = output + box * size * size * 3 + y[:, None] * size * 3 + lanes[None, :]
    tl.store(target, value.to(tl.uint8), mask=is_row[:, None] & is_lane[None, :])
