"""`augment` for GPUs, in Triton: float32 inside, two passes over a view's pixels, four over a blurred one's.

1. The mean gray that contrast needs: the operations before it, and a sum for each tile of pixels.
2. Jitter and grayscale; a view without blur is flipped, normalised and written, one with blur is put aside in planes.
3. The blur along the rows, from planes to planes.
4. The blur along the columns; flip, normalise, write.

A program has one tile of one view, whose parameters are the same for all its pixels: no two threads of a warp part
ways, and what a view does not need costs an empty program. Only so many views are between 2 and 4 at a time that
their planes stay small. Sums are in a fixed order: two runs give the same bits.
Legend: M samples, S side of a view, A = S * S pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.config import ViewConfig
from pipelines.kernels import Argument, KernelLaunch

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: then the kernels run on the CPU, slowly."""

_TILE = 1024  # pixels
_BLUR_TILE = 512  # fewer, since six loads of each tap are under way at once
_PLANE_ELEMENTS = 1 << 24  # of each of the two sets of planes


def augment_triton(crops: Tensor, table: Tensor, weights: Tensor, config: ViewConfig, dtype: torch.dtype) -> Tensor:
    """`pipelines.augment.augment` in float32, rounded once to ``dtype``.

    crops: uint8 [..., S, S, 3] on a GPU, M in all; copied only if the pixels of one do not lie side by side, or if
    they have more than two dimensions before them. table: float64 [M, 13]. weights: float64 [M, taps].
    Returns ``dtype`` [M, 3, S, S] in channels_last. Nothing is waited for.
    """
    side = crops.shape[-2]
    output = torch.empty((len(table), side, side, 3), dtype=dtype, device=crops.device)
    with torch.cuda.device_of(crops):
        for launch in launches(crops, table, weights, config, output):
            launch.run()
    return output.permute(0, 3, 1, 2)


def launches(
    crops: Tensor, table: Tensor, weights: Tensor, config: ViewConfig, output: Tensor
) -> Iterator[KernelLaunch]:
    """The launches that fill ``output`` [M, S, S, 3], in order. All shapes are known on the host."""
    side, count = crops.shape[-2], len(table)
    if count == 0:
        return
    if crops.stride()[-3:] != (3 * side, 3, 1):
        crops = crops.contiguous()
    if crops.ndim == 4:
        crops = crops[None]
    elif crops.ndim != 5:
        crops = crops.flatten(0, -4)[None]
    table = table.contiguous()
    area = side * side
    tiles, blur_tiles = triton.cdiv(area, _TILE), triton.cdiv(area, _BLUR_TILE)
    jitters, blurs = config.jitter_probability > 0, config.blur_probability > 0
    gray_sums = torch.empty((count, tiles) if jitters else (1, 1), dtype=torch.float32, device=crops.device)
    source: dict[str, Argument] = {
        "crops": crops, "table": table, "gray_sums": gray_sums,
        "side": side, "views": crops.shape[1], "outer_stride": crops.stride(0), "view_stride": crops.stride(1),
    }  # fmt: skip
    target: dict[str, Argument] = {"output": output}
    for name, values in (("mean", config.mean), ("std", config.std)):
        for channel, value in zip(("red", "green", "blue"), values, strict=True):
            target[f"{name}_{channel}"] = float(value)
    blocks = {"TILE": _TILE, "BLOCK_TILES": triton.next_power_of_2(tiles)}
    flips = {"FLIPS": config.flip_probability > 0}
    if jitters:
        yield KernelLaunch(
            kernel=_sum_grays,
            grid=(count * tiles,),
            arguments=source | {"tiles": tiles},
            constants={"TILE": _TILE},
            num_warps=8,
        )

    at_once = max(16, _PLANE_ELEMENTS // (3 * area) // 16 * 16) if blurs else count
    shape = (min(count, at_once), 3, area) if blurs else (1, 1, 1)
    planes, blurred_rows = (torch.empty(shape, dtype=torch.float32, device=crops.device) for _ in range(2))
    weights = weights.float().contiguous()
    for first in range(0, count, at_once):
        views = min(at_once, count - first)
        yield KernelLaunch(
            kernel=_colour,
            grid=(views * tiles,),
            arguments=source | {"planes": planes} | target | {"first": first, "tiles": tiles},
            constants={
                **blocks, **flips,
                "JITTERS": jitters, "GRAYSCALES": config.grayscale_probability > 0, "BLURS": blurs,
            },
            num_warps=8,
        )  # fmt: skip
        if blurs:
            place: dict[str, Argument] = {"side": side, "first": first, "tiles": blur_tiles}
            constants = {"TILE": _BLUR_TILE, "TAPS": weights.shape[1]}
            yield KernelLaunch(
                kernel=_blur_rows,
                grid=(views * blur_tiles,),
                arguments={"table": table, "weights": weights, "planes": planes, "blurred_rows": blurred_rows} | place,
                constants=constants,
            )
            yield KernelLaunch(
                kernel=_blur_columns,
                grid=(views * blur_tiles,),
                arguments={"table": table, "weights": weights, "blurred_rows": blurred_rows} | target | place,
                constants=constants | flips,
            )


# Columns of `pipelines.augment`.
_BRIGHTNESS = tl.constexpr(0)
_CONTRAST = tl.constexpr(1)
_HUE = tl.constexpr(3)
_ORDER = tl.constexpr(4)
_JITTER = tl.constexpr(8)
_GRAYSCALE = tl.constexpr(9)
_BLUR = tl.constexpr(10)
_FLIP = tl.constexpr(11)
_COLUMNS = tl.constexpr(13)


@triton.jit
def _sum_grays(
    crops, table, gray_sums, side, views, outer_stride, view_stride, tiles, TILE: tl.constexpr
):  # fmt: skip
    """Sum of the grays of each tile [M, tiles] as contrast meets them; nothing for a view without jitter."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = table + sample * _COLUMNS
    if tl.load(row + _JITTER) > 0:
        pixels = tile * TILE + tl.arange(0, TILE)
        is_pixel = pixels < side * side
        red, green, blue = _unpack(crops, sample, views, outer_stride, view_stride, pixels, is_pixel)
        place_of_contrast = 0
        for place in range(1, 4):
            if tl.load(row + _ORDER + place).to(tl.int32) == _CONTRAST:
                place_of_contrast = place
        for place in range(0, place_of_contrast):
            red, green, blue = _jitter(red, green, blue, row, place, 0.0)
        gray = tl.where(is_pixel, _gray(red, green, blue), 0.0)
        tl.store(gray_sums + sample * tiles + tile, tl.sum(gray, axis=0))


@triton.jit
def _colour(
    crops, table, gray_sums, side, views, outer_stride, view_stride,
    planes, output, mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    first, tiles,
    TILE: tl.constexpr, BLOCK_TILES: tl.constexpr, FLIPS: tl.constexpr,
    JITTERS: tl.constexpr, GRAYSCALES: tl.constexpr, BLURS: tl.constexpr,
):  # fmt: skip
    """Jitter and grayscale; to ``planes`` [M, 3, A] what will be blurred, everything else to the output."""
    number = (tl.program_id(0) // tiles).to(tl.int64)  # among the planes
    sample = first + number
    tile = tl.program_id(0) % tiles
    row = table + sample * _COLUMNS
    area = side * side
    pixels = tile * TILE + tl.arange(0, TILE)
    is_pixel = pixels < area
    red, green, blue = _unpack(crops, sample, views, outer_stride, view_stride, pixels, is_pixel)
    if JITTERS:  # noqa: SIM102 - known when compiled, unlike the next
        if tl.load(row + _JITTER) > 0:
            all_tiles = tl.arange(0, BLOCK_TILES)
            sums = tl.load(gray_sums + sample * tiles + all_tiles, mask=all_tiles < tiles, other=0.0)
            mean_gray = tl.sum(sums, axis=0) / area
            for place in range(0, 4):
                red, green, blue = _jitter(red, green, blue, row, place, mean_gray)
    if GRAYSCALES:  # noqa: SIM102
        if tl.load(row + _GRAYSCALE) > 0:
            red = _gray(red, green, blue)
            green = red
            blue = red
    put_aside = False
    if BLURS:
        put_aside = tl.load(row + _BLUR) > 0
    if put_aside:
        plane = planes + number * 3 * area + pixels
        tl.store(plane, red, mask=is_pixel)
        tl.store(plane + area, green, mask=is_pixel)
        tl.store(plane + 2 * area, blue, mask=is_pixel)
    else:
        _write(
            red, green, blue, row, output, sample, side, pixels,
            mean_red, mean_green, mean_blue, std_red, std_green, std_blue, FLIPS,
        )  # fmt: skip


@triton.jit
def _blur_rows(
    table, weights, planes, blurred_rows, side, first, tiles, TILE: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """From ``planes`` to ``blurred_rows``, both [M, 3, A]; nothing for a view without blur."""
    number = (tl.program_id(0) // tiles).to(tl.int64)
    row = table + (first + number) * _COLUMNS
    if tl.load(row + _BLUR) > 0:
        area = side * side
        pixels = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
        is_pixel = pixels < area
        x = pixels % side
        line = planes + number * 3 * area + (pixels - x)
        red, green, blue = _blur(line, x, 1, side, area, is_pixel, weights + (first + number) * TAPS, TAPS)
        plane = blurred_rows + number * 3 * area + pixels
        tl.store(plane, red, mask=is_pixel)
        tl.store(plane + area, green, mask=is_pixel)
        tl.store(plane + 2 * area, blue, mask=is_pixel)


@triton.jit
def _blur_columns(
    table, weights, blurred_rows, output, mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    side, first, tiles, TILE: tl.constexpr, TAPS: tl.constexpr, FLIPS: tl.constexpr,
):  # fmt: skip
    """From ``blurred_rows`` [M, 3, A] to the output; nothing for a view without blur."""
    number = (tl.program_id(0) // tiles).to(tl.int64)
    sample = first + number
    row = table + sample * _COLUMNS
    if tl.load(row + _BLUR) > 0:
        area = side * side
        pixels = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
        line = blurred_rows + number * 3 * area + pixels % side
        red, green, blue = _blur(line, pixels // side, side, side, area, pixels < area, weights + sample * TAPS, TAPS)
        _write(
            red, green, blue, row, output, sample, side, pixels,
            mean_red, mean_green, mean_blue, std_red, std_green, std_blue, FLIPS,
        )  # fmt: skip


@triton.jit
def _unpack(crops, sample, views, outer_stride, view_stride, pixels, is_pixel):
    """Red, green and blue of a tile in [0, 1]; sample counts along the crops' second dimension first."""
    crop = crops + (sample // views) * outer_stride + (sample % views) * view_stride + pixels * 3
    red = tl.load(crop, mask=is_pixel, other=0).to(tl.float32)
    green = tl.load(crop + 1, mask=is_pixel, other=0).to(tl.float32)
    blue = tl.load(crop + 2, mask=is_pixel, other=0).to(tl.float32)
    return tl.div_rn(red, 255.0), tl.div_rn(green, 255.0), tl.div_rn(blue, 255.0)


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _jitter(red, green, blue, row, place, mean_gray):
    """The operation that is due at a place of the view's order."""
    operation = tl.load(row + _ORDER + place).to(tl.int32)
    if operation == _HUE:
        shift = tl.load(row + _HUE)
        turn = ((shift - tl.floor(shift)) * 6.0).to(tl.float32)
        value = tl.maximum(tl.maximum(red, green), blue)
        chroma = value - tl.minimum(tl.minimum(red, green), blue)
        difference = tl.where(value == red, green - blue, tl.where(value == green, blue - red, red - green))
        sector = tl.where(value == red, 0.0, tl.where(value == green, 2.0, 4.0))
        hue = sector + tl.div_rn(difference, tl.where(chroma == 0, 1.0, chroma)) + turn  # -1 to 11
        hue = tl.where(hue < 0, hue + 6.0, tl.where(hue >= 6.0, hue - 6.0, hue))
        # Each channel is the value less its share of the chroma; its share falls and rises with the hue.
        red = _clamp(value - chroma * _clamp(2.0 - tl.abs(hue - 3.0)))
        green = _clamp(value - chroma * _clamp(tl.abs(hue - 2.0) - 1.0))
        blue = _clamp(value - chroma * _clamp(tl.abs(hue - 4.0) - 1.0))
    else:
        factor = tl.load(row + operation).to(tl.float32)
        reference = tl.where(operation == _CONTRAST, mean_gray, _gray(red, green, blue))
        reference = (1.0 - factor) * tl.where(operation == _BRIGHTNESS, 0.0, reference)
        red = _clamp(factor * red + reference)
        green = _clamp(factor * green + reference)
        blue = _clamp(factor * blue + reference)
    return red, green, blue


@triton.jit
def _blur(line, position, stride, side, area, is_pixel, weights, TAPS: tl.constexpr):
    """Red, green and blue, blurred along one axis with repeated borders.

    line: where position 0 of the red plane is, for each pixel; stride: from one position to the next; weights: of the
    taps at distance 0, 1, ….
    """
    middle = line + position * stride
    weight = tl.load(weights)
    red = weight * tl.load(middle, mask=is_pixel, other=0.0)
    green = weight * tl.load(middle + area, mask=is_pixel, other=0.0)
    blue = weight * tl.load(middle + 2 * area, mask=is_pixel, other=0.0)
    for distance in range(1, TAPS):
        weight = tl.load(weights + distance)
        before = line + tl.maximum(position - distance, 0) * stride
        after = line + tl.minimum(position + distance, side - 1) * stride
        red += weight * (tl.load(before, mask=is_pixel, other=0.0) + tl.load(after, mask=is_pixel, other=0.0))
        before += area
        after += area
        green += weight * (tl.load(before, mask=is_pixel, other=0.0) + tl.load(after, mask=is_pixel, other=0.0))
        before += area
        after += area
        blue += weight * (tl.load(before, mask=is_pixel, other=0.0) + tl.load(after, mask=is_pixel, other=0.0))
    return red, green, blue


@triton.jit
def _write(
    red, green, blue, row, output, sample, side, pixels,
    mean_red, mean_green, mean_blue, std_red, std_green, std_blue, FLIPS: tl.constexpr,
):  # fmt: skip
    """Flip, normalise, round, and store with the channels side by side."""
    place = pixels
    if FLIPS:  # noqa: SIM102
        if tl.load(row + _FLIP) > 0:
            x = pixels % side
            place = pixels - x + (side - 1 - x)
    target = output + sample * 3 * side * side + place * 3
    is_pixel = pixels < side * side
    dtype = output.dtype.element_ty
    tl.store(target, tl.div_rn(red - mean_red, std_red).to(dtype), mask=is_pixel)
    tl.store(target + 1, tl.div_rn(green - mean_green, std_green).to(dtype), mask=is_pixel)
    tl.store(target + 2, tl.div_rn(blue - mean_blue, std_blue).to(dtype), mask=is_pixel)
