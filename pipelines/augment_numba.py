"""`augment` for CPUs, compiled by numba: float32, one thread per view, two or three passes over its pixels.

The pixels of a view lie in three planes, one per channel, so that the compiler makes vector instructions of every
loop. Contrast needs the mean gray of what comes before it: the operations before it run in a first pass, it and those
after it in a second, block by block, each block small enough for the first cache. The blur runs along the rows, then
along the columns, and what comes out of the columns is normalised and written at once. Nothing is added up across
threads or views: a view's result depends on its crop and its parameters alone, whatever the number of threads.
Legend: M samples, S side of a view, A = S * S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from torch import Tensor

from pipelines.config import ViewConfig
from pipelines.kernels import compile_by_numba
from pipelines.threads import run_in_threads

# Of the columns of `pipelines.augment`. Written out once more: a compiled function in numba's cache on the disk is not
# replaced when a constant of another file changes.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_ORDER, _JITTER, _GRAYSCALE, _BLUR, _FLIP = 4, 8, 9, 10, 11
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)

_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(number) for number in (0, 1, 2, 3, 4, 6))
_LEVELS = np.float32(255)
_BLOCK = 1024  # pixels
_LEAST_WEIGHT = 2.0**-32  # taps below it do not show in float32
_SHARES = 8  # that each thread takes, about: some views take five times as long as others

# Only called by compiled functions: wrappers for callers in Python would take a third of the compile time.
_inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

Floats = npt.NDArray[np.float32]
Float = Any  # np.float32: mypy knows NumPy's scalars as what Python's functions take, not what they give
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


def augment_numba(crops: Tensor, table: Tensor, blur: Tensor, config: ViewConfig, num_threads: int) -> Tensor:
    """`pipelines.augment.augment` in float32.

    crops: uint8 [..., S, S, 3] on the CPU, M in all; copied only if the pixels of one do not lie side by side.
    table: float64 [M, 13]. blur: float64 [M, taps], of `blur_weights`. Returns float32 [M, 3, S, S] in channels_last.
    """
    side = crops.shape[-2]
    area, count = side * side, len(table)
    assert crops[..., 0, 0, 0].numel() == count
    output = np.empty(3 * area * count, dtype=np.float32)  # NumPy asks for huge pages; page faults would cost a third
    images = torch.from_numpy(output).view(count, side, side, 3).permute(0, 3, 1, 2)
    if count == 0:
        return images
    if crops.stride()[-3:] != (3 * side, 3, 1):
        crops = crops.contiguous()
    starts = np.zeros(1, dtype=np.int64)
    for length, stride in zip(crops.shape[:-3], crops.stride()[:-3], strict=True):
        starts = (starts[:, None] + stride * np.arange(length)).reshape(-1)
    pixels = crops.as_strided((int(starts.max()) + 3 * area,), (1,)).numpy()
    parameters = table.contiguous().numpy()
    weights = np.where(blur.numpy() < _LEAST_WEIGHT, 0, blur.numpy()).astype(np.float32)
    radius = weights.shape[1] - 1
    probabilities = (
        config.jitter_probability, config.grayscale_probability, config.blur_probability, config.flip_probability
    )  # fmt: skip
    switches = np.array(probabilities) > 0
    mean, std = (np.array(numbers, dtype=np.float32) for numbers in (config.mean, config.std))
    kernel = compiled_kernel()

    num_threads = max(1, min(num_threads, count))
    step = -(-count // (_SHARES * num_threads)) if num_threads > 1 else count
    shares = iter(range(0, count, step))  # whose `next` no two threads can be in

    def work() -> None:
        scratch = np.empty(3 * area + 4 * side + 2 * radius, dtype=np.float32)
        sums = np.empty(_BLOCK, dtype=np.float64)
        for first in shares:
            stop = min(first + step, count)
            kernel(pixels, starts, parameters, weights, output, side, switches, mean, std, scratch, sums, first, stop)

    run_in_threads(work, num_threads)
    return images


@cache
def compiled_kernel() -> Callable[..., None]:
    """`_augment` as machine code, from numba's cache on the disk where there is one."""
    floats, integer = types.float32[::1], types.int64
    signature = types.void(
        types.uint8[::1], types.int64[::1], types.float64[:, ::1], types.float32[:, ::1], floats, integer,
        types.boolean[::1], floats, floats, floats, types.float64[::1], integer, integer,
    )  # fmt: skip
    return compile_by_numba(_augment, signature, "the augmentation")


def _augment(
    pixels: Bytes,
    starts: npt.NDArray[np.int64],
    table: Doubles,
    blur: Floats,
    output: Floats,
    side: int,
    switches: npt.NDArray[np.bool_],
    mean: Floats,
    std: Floats,
    scratch: Floats,
    sums: Doubles,
    first: int,
    stop: int,
) -> None:
    """Samples ``first`` to ``stop``. scratch: float32 [3 A + 4 S + 2 (taps - 1)]; sums: float64 [_BLOCK]."""
    area = side * side
    planes, rest = scratch[: 3 * area], scratch[3 * area :]
    lines, padded = rest[: 3 * side], rest[3 * side :]
    for sample in range(first, stop):
        row = table[sample]
        weights = blur[sample]
        crop = pixels[starts[sample] : starts[sample] + 3 * area]
        _color(crop, row, switches[0] and row[_JITTER] > 0, planes, area, sums)
        num_planes = 3
        if switches[1] and row[_GRAYSCALE] > 0:
            _to_gray(planes[:area], planes[area : 2 * area], planes[2 * area :])
            num_planes = 1
        reach = -1
        if switches[2] and row[_BLUR] > 0:
            reach = len(weights) - 1
            while reach > 0 and weights[reach] == _ZERO:
                reach -= 1
            for y in range(num_planes * side):
                _blur_row(planes[y * side : (y + 1) * side], reach, weights, padded)
        flip = switches[3] and row[_FLIP] > 0
        target = output[3 * area * sample : 3 * area * (sample + 1)]
        source = planes if reach < 0 else lines
        stride = (area if reach < 0 else side) if num_planes == 3 else 0  # gray: the same for all three channels
        for y in range(side):
            begin = y * side if reach < 0 else 0
            if reach >= 0:
                for plane in range(num_planes):
                    line = lines[plane * side : (plane + 1) * side]
                    _blur_column(planes[plane * area : (plane + 1) * area], y, reach, weights, line)
            _write(
                source[begin : begin + side],
                source[begin + stride : begin + stride + side],
                source[begin + 2 * stride : begin + 2 * stride + side],
                flip, mean, std, target[3 * side * y : 3 * side * (y + 1)],
            )  # fmt: skip


@_inner
def _color(crop: Bytes, row: Doubles, jitter: bool, planes: Floats, area: int, sums: Doubles) -> None:
    """Unpacks a crop into three planes, and jitters them."""
    place_of_contrast = 0
    while place_of_contrast < 3 and int(row[_ORDER + place_of_contrast]) != _CONTRAST:
        place_of_contrast += 1
    for i in range(len(sums)):
        sums[i] = 0.0
    for begin in range(0, area, _BLOCK):
        end = min(begin + _BLOCK, area)
        red, green, blue = _block(planes, area, begin, end)
        _unpack(crop[3 * begin : 3 * end], red, green, blue)
        if jitter:
            for place in range(place_of_contrast):
                _apply(int(row[_ORDER + place]), row, red, green, blue)
            _add_gray(red, green, blue, sums)
    if jitter:
        total = 0.0
        for i in range(len(sums)):  # one for each place in a block: that makes vector instructions, in a fixed order
            total += sums[i]
        factor = np.float32(row[_CONTRAST])
        offset = (_ONE - factor) * np.float32(total / area)
        for begin in range(0, area, _BLOCK):
            end = min(begin + _BLOCK, area)
            red, green, blue = _block(planes, area, begin, end)
            _scale(factor, offset, red, green, blue)
            for place in range(place_of_contrast + 1, 4):
                _apply(int(row[_ORDER + place]), row, red, green, blue)


@_inner
def _block(planes: Floats, area: int, begin: int, end: int) -> tuple[Floats, Floats, Floats]:
    return planes[begin:end], planes[area + begin : area + end], planes[2 * area + begin : 2 * area + end]


@_inner
def _apply(operation: int, row: Doubles, red: Floats, green: Floats, blue: Floats) -> None:
    if operation == _BRIGHTNESS:
        _scale(np.float32(row[_BRIGHTNESS]), _ZERO, red, green, blue)
    elif operation == _SATURATION:
        _saturate(np.float32(row[_SATURATION]), red, green, blue)
    elif operation == _HUE:
        _turn_hue(np.float32(6.0 * (row[_HUE] - np.floor(row[_HUE]))), red, green, blue)


@_inner
def _unpack(crop: Bytes, red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        red[i] = np.float32(crop[3 * i]) / _LEVELS
        green[i] = np.float32(crop[3 * i + 1]) / _LEVELS
        blue[i] = np.float32(crop[3 * i + 2]) / _LEVELS


@_inner
def _clamp(x: Float) -> Float:
    return min(max(x, _ZERO), _ONE)


@_inner
def _gray(red: Float, green: Float, blue: Float) -> Float:
    return _RED * red + _GREEN * green + _BLUE * blue


@_inner
def _scale(factor: Float, offset: Float, red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        red[i] = _clamp(factor * red[i] + offset)
        green[i] = _clamp(factor * green[i] + offset)
        blue[i] = _clamp(factor * blue[i] + offset)


@_inner
def _saturate(factor: Float, red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        offset = (_ONE - factor) * _gray(red[i], green[i], blue[i])
        red[i] = _clamp(factor * red[i] + offset)
        green[i] = _clamp(factor * green[i] + offset)
        blue[i] = _clamp(factor * blue[i] + offset)


@_inner
def _turn_hue(turn: Float, red: Floats, green: Floats, blue: Floats) -> None:
    """turn: 0 to 6, sixths of the colour circle."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        difference = g - b if value == r else (b - r if value == g else r - g)
        sector = _ZERO if value == r else (_TWO if value == g else _FOUR)
        hue = sector + difference / (_ONE if chroma == _ZERO else chroma) + turn  # -1 to 11
        hue = hue + _SIX if hue < _ZERO else (hue - _SIX if hue >= _SIX else hue)
        # Each channel is the value less its share of the chroma; its share falls and rises with the hue.
        red[i] = _clamp(value - chroma * _clamp(_TWO - abs(hue - _THREE)))
        green[i] = _clamp(value - chroma * _clamp(abs(hue - _TWO) - _ONE))
        blue[i] = _clamp(value - chroma * _clamp(abs(hue - _FOUR) - _ONE))


@_inner
def _add_gray(red: Floats, green: Floats, blue: Floats, sums: Doubles) -> None:
    for i in range(len(red)):
        sums[i] += np.float64(_gray(red[i], green[i], blue[i]))


@_inner
def _to_gray(red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        red[i] = _gray(red[i], green[i], blue[i])


@_inner
def _blur_row(row: Floats, reach: int, weights: Floats, padded: Floats) -> None:
    side = len(row)
    for i in range(side):
        padded[reach + i] = row[i]
    for distance in range(1, reach + 1):
        padded[reach - distance] = row[0]
        padded[reach + side - 1 + distance] = row[side - 1]
    _weigh(padded[reach : reach + side], weights[0], row)
    distance = 1
    while distance < reach:
        near, far = reach - distance, reach + distance
        _add_two_pairs(
            padded[near : near + side], padded[far : far + side], weights[distance],
            padded[near - 1 : near - 1 + side], padded[far + 1 : far + 1 + side], weights[distance + 1], row,
        )  # fmt: skip
        distance += 2
    if distance == reach:
        _add_pair(padded[:side], padded[2 * reach : 2 * reach + side], weights[reach], row)


@_inner
def _blur_column(plane: Floats, y: int, reach: int, weights: Floats, line: Floats) -> None:
    side = len(line)
    _weigh(plane[y * side : (y + 1) * side], weights[0], line)
    distance = 1
    while distance < reach:
        _add_two_pairs(
            _row(plane, side, y - distance), _row(plane, side, y + distance), weights[distance],
            _row(plane, side, y - distance - 1), _row(plane, side, y + distance + 1), weights[distance + 1], line,
        )  # fmt: skip
        distance += 2
    if distance == reach:
        _add_pair(_row(plane, side, y - reach), _row(plane, side, y + reach), weights[reach], line)


@_inner
def _row(plane: Floats, side: int, y: int) -> Floats:
    y = min(max(y, 0), side - 1)
    return plane[y * side : (y + 1) * side]


@_inner
def _weigh(source: Floats, weight: Float, target: Floats) -> None:
    for i in range(len(target)):
        target[i] = weight * source[i]


@_inner
def _add_pair(a: Floats, b: Floats, weight: Float, target: Floats) -> None:
    for i in range(len(target)):
        target[i] += weight * (a[i] + b[i])


@_inner
def _add_two_pairs(a: Floats, b: Floats, weight: Float, c: Floats, d: Floats, weight2: Float, target: Floats) -> None:
    for i in range(len(target)):
        target[i] += weight * (a[i] + b[i]) + weight2 * (c[i] + d[i])


@_inner
def _write(red: Floats, green: Floats, blue: Floats, flip: bool, mean: Floats, std: Floats, output: Floats) -> None:
    """One row of pixels, normalised, with its channels side by side."""
    side = len(red)
    mean_red, mean_green, mean_blue = mean[0], mean[1], mean[2]
    std_red, std_green, std_blue = std[0], std[1], std[2]
    if flip:
        for i in range(side):
            output[3 * i] = (red[side - 1 - i] - mean_red) / std_red
            output[3 * i + 1] = (green[side - 1 - i] - mean_green) / std_green
            output[3 * i + 2] = (blue[side - 1 - i] - mean_blue) / std_blue
    else:
        for i in range(side):
            output[3 * i] = (red[i] - mean_red) / std_red
            output[3 * i + 1] = (green[i] - mean_green) / std_green
            output[3 * i + 2] = (blue[i] - mean_blue) / std_blue
