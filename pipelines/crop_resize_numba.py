"""`crop_resize` for CPUs, compiled by numba: as PIL resizes, bit for bit, for boxes of any size; one thread per box.

A box goes through in blocks of 32 rows, turned so that the rows of a block lie side by side: what is added up is then
the same for all of them, and the compiler makes vector instructions of it. Four source pixels are added at a time; the
filter is filled up with zeros. Pixels are kept in 32 bits, red lowest. The arithmetic is PIL's: weights of 22 bits,
sums of 32, rounded to 8 bits between the two passes.
Legend: M boxes, S side of the output, h x w a box.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types, uint32
from torch import Tensor

from pipelines.kernels import compile_by_numba
from pipelines.packed_images import PackedImages
from pipelines.threads import run_in_threads

_SHARES = 8  # that each thread takes, about: some threads are slower than others
_ROWS = 32  # of a block
_TAPS = 4  # added up at a time
_HALF = np.uint32(1 << 21)
_BITS = np.uint32(22)  # of a weight, after the binary point
_BYTE = np.uint32(255)
_GREEN, _BLUE = np.uint32(8), np.uint32(16)

# Only called by compiled functions: wrappers for callers in Python would take a third of the compile time.
_inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def crop_resize_numba(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    fill: tuple[int, int, int],
    num_threads: int,
) -> Tensor:
    """`pipelines.crop_resize.crop_resize` for pixels on the CPU, not planar, and boxes inside their images."""
    output = np.empty((len(rows), output_size, output_size, 3), dtype=np.uint8)
    if output.size == 0:
        return torch.from_numpy(output)
    pixels, target = images.pixels.numpy(), output.view(np.int8).reshape(-1)
    box_heights, box_widths = boxes[:, 2:4].astype(np.int64).T
    geometry = box_geometry(images.offsets[rows], images.widths[rows], boxes)
    needed = scratch_size(boxes, output_size)
    kernel = compiled_kernel()

    # Dealt out from the largest box to the smallest, so that all shares are about the same work.
    num_threads = max(1, min(num_threads, len(rows)))
    by_work = np.argsort(-(box_heights * np.maximum(box_widths, output_size)), kind="stable")
    num_shares = min(len(rows), _SHARES * num_threads) if num_threads > 1 else 1
    shares = iter([np.ascontiguousarray(by_work[share::num_shares]) for share in range(num_shares)])

    def work() -> None:
        scratch = np.empty(needed, dtype=np.uint32)
        for numbers in shares:
            kernel(pixels, geometry, numbers, output_size, packed(fill), target, scratch)

    run_in_threads(work, num_threads)
    return torch.from_numpy(output)


@cache
def compiled_kernel() -> Callable[..., None]:
    """`resize_boxes` as machine code, from numba's cache on the disk where there is one."""
    integers = types.int64[::1]
    # The output is int8: FFCV makes numba's one and only type of uint8 arrays read-only.
    signature = types.void(
        types.uint8[::1], types.int64[:, ::1], integers, types.int64, types.int64, types.int8[::1], types.uint32[::1]
    )
    return compile_by_numba(resize_boxes, signature, "the resize")


def box_geometry(
    offsets: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], boxes: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """What `resize_boxes` is told of placed boxes [M, 8]. offsets, widths: [M], of the image of each."""
    top, left = boxes[:, :2].astype(np.int64).T
    memory = np.stack((offsets + 3 * (top * widths + left), 3 * widths), axis=1)
    return np.concatenate((memory, boxes[:, 2:].astype(np.int64)), axis=1)


def packed(fill: tuple[int, int, int]) -> int:
    """A colour in one number, red lowest."""
    return fill[0] | fill[1] << 8 | fill[2] << 16


def scratch_size(boxes: npt.NDArray[np.int32], size: int) -> int:
    """How many uint32 `resize_boxes` needs beside, for these placed boxes [M, 8] and outputs of side ``size``."""
    max_height, max_width = (int(side) for side in boxes[:, 2:4].max(axis=0))
    shrink = max(1, int((-(-boxes[:, 2:4] // boxes[:, 4:6])).max()))
    taps = 2 * shrink + 2 + _TAPS
    block = (max_width + _TAPS) * _ROWS
    narrow = (max_height + _TAPS) * size
    return block + _ROWS * size + narrow + 3 * max(size, _ROWS) + 2 * size + size * taps


def resize_boxes(
    pixels: npt.NDArray[np.uint8],
    geometry: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    size: int,
    fill: int,
    output: npt.NDArray[np.int8],
    scratch: npt.NDArray[np.uint32],
) -> None:
    """Some boxes of many images: ``PIL.Image.crop``, then ``resize`` with ``BILINEAR`` to the new width, then to the
    new height, then cut.

    pixels: uint8, one dimension. geometry: int64 [M, 8]: the place of a box's first byte in ``pixels``, bytes from a
    row to the next, and the last six of a placed box.
    numbers: int64 [·], the boxes to do. output: [M * S * S * 3]: bytes of 0 to 255, whatever the type's sign.
    fill: `packed`. scratch: uint32 [scratch_size], for the largest of these boxes, whatever is in it.
    """
    length = 3 * size * size
    for number in numbers:
        first, row_stride = geometry[number, :2]
        target = output[number * length : (number + 1) * length]
        _resize(pixels, first, row_stride, geometry[number, 2:], size, fill, target, scratch)


@_inner
def _resize(
    pixels: npt.NDArray[np.uint8],
    first: int,
    row_stride: int,
    placed: npt.NDArray[np.int64],
    size: int,
    fill: int,
    output: npt.NDArray[np.uint8],
    scratch: npt.NDArray[np.uint32],
) -> None:
    """placed: the last six numbers of a placed box."""
    height, width, new_height, new_width, corner_row, corner_column = placed
    # Of the output, what the resized box covers; of the box, what that is made of.
    top, bottom = max(0, -corner_row), min(size, new_height - corner_row)
    left, right = max(0, -corner_column), min(size, new_width - corner_column)
    begin_row, end_row = _reach(height, new_height, corner_row + top, corner_row + bottom - 1)
    begin, end_column = _reach(width, new_width, corner_column + left, corner_column + right - 1)
    first += 3 * begin
    lanes = max(size, _ROWS)
    end = (width + _TAPS) * _ROWS
    block, rest = scratch[:end], scratch[end:]
    columns, rest = rest[: _ROWS * size], rest[_ROWS * size :]
    end = (height + _TAPS) * size
    narrow, rest = rest[:end], rest[end:]
    sums, rest = rest[: 3 * lanes], rest[3 * lanes :]
    starts, groups, weights = rest[:size], rest[size : 2 * size], rest[2 * size :]

    taps = _fill_weights(width, new_width, corner_column, size, starts, groups, weights)
    for first_row in range(begin_row, end_row, _ROWS):
        num_rows = min(_ROWS, end_row - first_row)
        start = first + first_row * row_stride
        _pack(pixels, start, row_stride, num_rows, end_column - begin, block[begin * _ROWS :])
        for column in range(left, right):
            _filter(
                block, int(starts[column]) * _ROWS, _ROWS, int(groups[column]),
                weights[column * taps : (column + 1) * taps], sums, lanes,
            )  # fmt: skip
            _join(sums, lanes, columns[column * _ROWS : (column + 1) * _ROWS])
        for row in range(num_rows):
            target = narrow[(first_row + row) * size : (first_row + row + 1) * size]
            for column in range(size):  # all of them, which is quicker than some
                target[column] = columns[column * _ROWS + row]

    taps = _fill_weights(height, new_height, corner_row, size, starts, groups, weights)
    for row in range(top, bottom):
        _filter(
            narrow, int(starts[row]) * size, size, int(groups[row]), weights[row * taps : (row + 1) * taps], sums, lanes
        )
        _store(sums, lanes, output[row * size * 3 : (row + 1) * size * 3])
    if bottom - top < size or right - left < size:
        for row in range(size):
            for column in range(size):
                if not (top <= row < bottom and left <= column < right):
                    for channel in range(3):
                        output[(row * size + column) * 3 + channel] = (fill >> (8 * channel)) & 255


@_inner
def _reach(box_size: int, new_size: int, first: int, last: int) -> tuple[int, int]:
    """The source pixels, from and below, that resized pixels from ``first`` to ``last`` are made of, or some more."""
    half_width = 2 * max(box_size, new_size)
    begin = ((2 * first + 1) * box_size - half_width) // (2 * new_size) - 1
    end = ((2 * last + 1) * box_size + half_width) // (2 * new_size) + 2
    return max(0, begin), min(box_size, end)


@_inner
def _fill_weights(
    box_size: int,
    new_size: int,
    first: int,
    size: int,
    starts: npt.NDArray[np.uint32],
    groups: npt.NDArray[np.uint32],
    weights: npt.NDArray[np.uint32],
) -> int:
    """PIL's triangle filter: first source pixel, number of groups of taps and weights (2**-22) of each output pixel.

    first: the resized pixel that is output pixel 0. Outputs outside the resized box are left out.
    Returns the taps reserved for each.
    """
    half_width = 2 * max(box_size, new_size)  # of the triangle; as the distances, times twice the new size: integers
    taps = 2 * ((max(box_size, new_size) + new_size - 1) // new_size) + 2
    taps += -taps % _TAPS
    for index in range(max(0, -first), min(size, new_size - first)):
        center = (2 * (first + index) + 1) * box_size
        start = max(0, (center - half_width) // (2 * new_size) - 1)
        while abs((2 * start + 1) * new_size - center) >= half_width:
            start += 1
        stop, total = start, 0
        while stop < box_size and abs((2 * stop + 1) * new_size - center) < half_width:
            total += half_width - abs((2 * stop + 1) * new_size - center)
            stop += 1
        count = (stop - start + _TAPS - 1) // _TAPS
        starts[index], groups[index] = start, count
        for tap in range(count * _TAPS):
            weight = 0.0
            if start + tap < stop:
                distance = abs((2 * (start + tap) + 1) * new_size - center)
                weight = np.floor((half_width - distance) / total * 4194304.0 + 0.5)
            weights[index * taps + tap] = np.uint32(weight)
    return taps


@_inner
def _pack(
    pixels: npt.NDArray[np.uint8], first: int, stride: int, num_rows: int, width: int, block: npt.NDArray[np.uint32]
) -> None:
    """Rows of a box, side by side; the last one fills the block up."""
    last = width - 1
    for row in range(_ROWS):
        start = first + min(row, num_rows - 1) * stride
        source = pixels[start : start + 3 * width]
        for column in range(last):
            place = 3 * column
            # All four bytes, so that it becomes one load. The fourth is the next pixel's: the last one has none.
            block[column * _ROWS + row] = (
                uint32(source[place])
                | (uint32(source[place + 1]) << _GREEN)
                | (uint32(source[place + 2]) << _BLUE)
                | (uint32(source[place + 3]) << uint32(24))
            )
        block[last * _ROWS + row] = (
            uint32(source[3 * last])
            | (uint32(source[3 * last + 1]) << _GREEN)
            | (uint32(source[3 * last + 2]) << _BLUE)
        )


@_inner
def _filter(
    source: npt.NDArray[np.uint32],
    start: int,
    length: int,
    groups: int,
    weights: npt.NDArray[np.uint32],
    sums: npt.NDArray[np.uint32],
    lanes: int,
) -> None:
    """Adds up weighted vectors of ``length`` pixels that lie one behind the other from ``start`` on."""
    red, green, blue = sums[:length], sums[lanes : lanes + length], sums[2 * lanes : 2 * lanes + length]
    for group in range(groups):
        w0, w1 = weights[_TAPS * group], weights[_TAPS * group + 1]
        w2, w3 = weights[_TAPS * group + 2], weights[_TAPS * group + 3]
        begin = start + group * _TAPS * length
        p0, p1 = source[begin : begin + length], source[begin + length : begin + 2 * length]
        p2, p3 = source[begin + 2 * length : begin + 3 * length], source[begin + 3 * length : begin + 4 * length]
        if group == 0:
            for i in range(length):
                a, b, c, d = p0[i], p1[i], p2[i], p3[i]
                red[i] = uint32(_HALF + w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))
                a, b, c, d = a >> _GREEN, b >> _GREEN, c >> _GREEN, d >> _GREEN
                green[i] = uint32(_HALF + w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))
                a, b, c, d = a >> _GREEN, b >> _GREEN, c >> _GREEN, d >> _GREEN
                blue[i] = uint32(_HALF + w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))
        else:
            for i in range(length):
                a, b, c, d = p0[i], p1[i], p2[i], p3[i]
                red[i] += uint32(w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))
                a, b, c, d = a >> _GREEN, b >> _GREEN, c >> _GREEN, d >> _GREEN
                green[i] += uint32(w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))
                a, b, c, d = a >> _GREEN, b >> _GREEN, c >> _GREEN, d >> _GREEN
                blue[i] += uint32(w0 * (a & _BYTE) + w1 * (b & _BYTE) + w2 * (c & _BYTE) + w3 * (d & _BYTE))


@_inner
def _join(sums: npt.NDArray[np.uint32], lanes: int, target: npt.NDArray[np.uint32]) -> None:
    """Rounded sums as pixels of 32 bits."""
    length = len(target)
    red, green, blue = sums[:length], sums[lanes : lanes + length], sums[2 * lanes : 2 * lanes + length]
    for i in range(length):
        target[i] = (red[i] >> _BITS) | ((green[i] >> _BITS) << _GREEN) | ((blue[i] >> _BITS) << _BLUE)


@_inner
def _store(sums: npt.NDArray[np.uint32], lanes: int, target: npt.NDArray[np.uint8]) -> None:
    """Rounded sums as three bytes a pixel."""
    length = len(target) // 3
    red, green, blue = sums[:length], sums[lanes : lanes + length], sums[2 * lanes : 2 * lanes + length]
    for i in range(length):
        target[3 * i], target[3 * i + 1] = red[i] >> _BITS, green[i] >> _BITS
        target[3 * i + 2] = blue[i] >> _BITS
