"""MoCo-v2's photometric augmentation: colour jitter, grayscale, blur, flip, normalise; one for all backends.

Batched with per-sample parameters, on any device, without a branch that depends on data: every shape is static and
nothing is read back to the host. Oracle: ``torchvision.transforms.v2.functional`` on float images in [0, 1], and
for the blur three boxes by NumPy.
Legend: M samples, S side of a view.

The four jitter operations come in a random order per sample. Brightness, contrast and saturation are all
``clamp(factor * x + (1 - factor) * reference)``, with 0, the mean gray or the gray itself as reference, so one
blend with per-sample factors serves for whichever of them is due; a factor of one changes nothing. Hue is due once:
the blends that come before it run first, then hue, then the others.

On CPUs, `augment_numba` computes the same in float32 and many times as fast, and on GPUs `augment_triton` does; what is
here is what they are tested by.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batch import CropBatch
from pipelines.config import ViewConfig
from pipelines.counter_rng import photometry_stream, uniform
from pipelines.kernels import Impl, automatic_impl
from pipelines.views import ViewRecipe

# Columns of a table of parameters, float64 [M, 13], a row for each sample. A single copy brings all to the device.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factors, and a shift in turns
ORDER = slice(4, 8)  # which of these four is due at each place
JITTER, GRAYSCALE, BLUR, FLIP = range(8, 12)  # 0 or 1
SIGMA = 12  # of the blur, pixels
_JITTER_ORDERS = np.array(list(permutations(range(4))))
_CPU_CHUNK_ELEMENTS = 1 << 17
_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's


def draw_augmentation(
    views: ViewRecipe, config: ViewConfig, seed: int, epoch: int, indices: npt.NDArray[np.int64]
) -> Tensor:
    """Parameters of all views of a batch, as a pure function of (seed, epoch, index, view).

    indices: int64 [B]. Returns float64 [V * B, 13], view by view, on the host.
    """
    return torch.cat([_draw_view(view.photometry, view.number, config, seed, epoch, indices) for view in views])


def augmented_views(
    batch: CropBatch, views: ViewRecipe, config: ViewConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """The views of a batch, augmented and normalised: V tensors ``dtype`` [B, 3, S, S], channels_last.

    views: the recipe that the batch's crops were cut by.
    """
    parameters = draw_augmentation(views, config, seed, batch.epoch, batch.indices)
    if batch.crops.is_cuda:
        parameters = parameters.pin_memory()  # else the copy would wait
    parameters = parameters.to(batch.crops.device, non_blocking=True)
    return augment_crops(batch.crops, parameters, views, config, dtype=dtype)


def augment_crops(
    crops: Tensor,
    parameters: Tensor,
    views: ViewRecipe,
    config: ViewConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """The views of crops with the parameters that `draw_augmentation` drew for them: nothing here needs the host.

    crops: uint8 [B, V, S, S, 3]. Returns V tensors ``dtype`` [B, 3, S, S], channels_last.
    """
    if all(view.photometry != "mocov2" for view in views):  # operations that no view wants need not run
        config = replace(config, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)
    return augment(crops.transpose(0, 1), parameters, config, dtype=dtype).chunk(len(views))


def augment(
    crops: Tensor,
    parameters: Tensor,
    config: ViewConfig,
    *,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """Augment and normalise.

    crops: uint8 [..., S, S, 3], RGB, M samples in all. parameters: float64 [M, 13], on the crops' device. impl: `auto`
    takes numba on a CPU and triton on a GPU, but for float64 and elsewhere torch; they differ by float32's rounding.
    Returns ``dtype`` [M, 3, S, S] in channels_last; the arithmetic is float32, or float64 if ``dtype`` is, also where
    an encoder's autocast is on.
    """
    assert len(parameters) == crops[..., 0, 0, 0].numel()
    if impl == "auto":
        impl = "torch" if dtype == torch.float64 else automatic_impl(crops.device, "augmented", _augment_a_crop)
    weights = blur_weights(parameters[:, SIGMA], config)
    if impl == "triton":
        from pipelines.augment_triton import augment_triton

        return augment_triton(crops, parameters, weights, config, dtype)
    if impl == "numba":
        from pipelines.augment_numba import augment_numba

        return augment_numba(crops, parameters, weights, config, torch.get_num_threads()).to(dtype)
    crops = crops.flatten(0, -4)  # copies unless each view is one contiguous block
    with torch.autocast("cuda" if crops.is_cuda else "cpu", enabled=False):
        if crops.device.type != "cpu":
            return _augment_chunk(crops, parameters, weights, config, dtype)
        # On a CPU the many passes over the pixels should find them in the cache.
        rows = max(1, _CPU_CHUNK_ELEMENTS // crops[0].numel()) if len(crops) else 1
        chunks = [
            _augment_chunk(*part, config, dtype)
            for part in zip(crops.split(rows), parameters.split(rows), weights.split(rows), strict=True)
        ]
        return torch.cat(chunks)


def _augment_a_crop(impl: Impl, device: torch.device) -> None:
    crop = torch.zeros(1, 3, 3, 3, dtype=torch.uint8, device=device)
    table = torch.zeros(1, SIGMA + 1, dtype=torch.float64, device=device)
    augment(crop, table, ViewConfig(image_size=3), impl=impl)


def _augment_chunk(
    crops: Tensor, parameters: Tensor, weights: Tensor, config: ViewConfig, dtype: torch.dtype
) -> Tensor:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    images = crops.permute(0, 3, 1, 2).to(compute, memory_format=torch.contiguous_format) / 255
    if config.jitter_probability > 0:
        images = torch.where(_per_sample(parameters[:, JITTER] > 0), color_jitter(images, parameters), images)
    if config.grayscale_probability > 0:
        images = torch.where(_per_sample(parameters[:, GRAYSCALE] > 0), _gray(images), images)
    if config.blur_probability > 0:
        images = blur(images, parameters[:, BLUR] > 0, weights)
    if config.flip_probability > 0:
        images = torch.where(_per_sample(parameters[:, FLIP] > 0), images.flip(-1), images)
    mean, std = (_per_channel(values, compute, images.device) for values in (config.mean, config.std))
    images = (images - mean) / std
    return images.to(dtype, memory_format=torch.channels_last)


@cache
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3, 1, 1], made once: a captured CUDA graph must not copy from the host, nor refer to what is gone."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def color_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each sample's own order.

    images: float [M, 3, S, S] in [0, 1]; returns the same shape. Applied to every sample.
    """
    order, factors = parameters[:, ORDER], parameters[:, : HUE + 1].to(images.dtype)
    hue_place = (order == HUE).to(torch.int64).argmax(dim=1)  # [M]
    for place in range(3):
        images = _blend(images, order[:, place], factors, active=place < hue_place)
    images = adjust_hue(images, factors[:, HUE])
    for place in range(1, 4):
        images = _blend(images, order[:, place], factors, active=place > hue_place)
    return images


def _blend(images: Tensor, operation: Tensor, factors: Tensor, active: Tensor) -> Tensor:
    """``clamp(f * x + (1 - f) * reference)`` where active, else unchanged. operation, active: [M]."""
    column = operation.to(torch.int64).clamp(max=SATURATION)[:, None]
    factor = torch.where(active, factors.gather(1, column)[:, 0], 1.0)
    gray = _gray(images)  # [M, 1, S, S]
    mean_gray = gray.mean(dim=(1, 2, 3), keepdim=True)
    reference = torch.where(_per_sample(operation == CONTRAST), mean_gray, gray)
    reference = reference * _per_sample(operation != BRIGHTNESS)
    factor = _per_sample(factor)
    return (factor * images + (1 - factor) * reference).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue in HSV. images: float [M, 3, S, S] in [0, 1]; shift: [M], turns. Returns the same shape."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - lowest
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = (sector + 6 * shift[:, None, None]).remainder(6)
    # Each channel is the value less its share of the chroma; its share falls and rises with the hue.
    channels = []
    for offset in (5, 3, 1):
        k = (sector + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1).clamp_(0, 1)


def blur_weights(sigma: Tensor, config: ViewConfig) -> Tensor:
    """Weights of the taps at distance 0, 1, … of a blur for each sigma [M], pixels: float64 [M, taps].

    Pillow's: a box of radius r weighs a pixel at distance d with ``clamp(r + 1 - d, 0, 1)``, and three of them, of
    sigma squared / 3 each, follow one another (Gwosdek, Grewenig, Bruhn, Weickert 2011). Their product is taken in
    Fourier space. Nothing here waits for the device.
    """
    largest = config.blur_sigma[1] if config.blur_probability > 0 else 0.0
    reach = math.floor((math.sqrt(4 * largest**2 + 1) - 1) / 2) + 1  # of the largest box
    variance = sigma.double().square() / 3
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()  # pixels on each side that count fully
    share = (2 * whole + 1) * (3 * variance - whole * (whole + 1)) / (6 * ((whole + 1).square() - variance))
    distance = torch.arange(3 * reach + 1, device=sigma.device, dtype=torch.float64)
    box = ((whole + share)[:, None] + 1 - distance[: reach + 1]).clamp(0, 1)
    box = box / (1 + 2 * (whole + share))[:, None]
    size = 6 * reach + 1
    cosines = torch.cos(2 * math.pi / size * distance[:, None] * torch.arange(size, device=sigma.device))
    folded = torch.cat((cosines[:1], 2 * cosines[1 : reach + 1]))  # both sides of a box
    return (box @ folded).pow(3) @ cosines.mT / size


def blur(images: Tensor, blurred: Tensor, weights: Tensor) -> Tensor:
    """Blur with repeated borders, as two products with S x S band matrices.

    images: float [M, 3, S, S]; blurred: bool [M]; weights: [M, taps], of `blur_weights`. A sample that is not blurred
    meets the identity matrix and keeps its exact values. Returns the same shape.
    """
    side, radius = images.shape[-1], weights.shape[1] - 1
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.where(blurred[:, None], weights.to(images.dtype)[:, taps.abs()], (taps == 0).to(images.dtype))
    # matrix[i, j] = sum of the taps t with clamp(i + t) = j; the same pattern for all samples.
    position = (torch.arange(side, device=images.device)[:, None] + taps).clamp(0, side - 1)  # [S, k]
    matrix = torch.einsum("mk,ikj->mij", kernel, F.one_hot(position, side).to(images.dtype))
    return matrix[:, None] @ images @ matrix[:, None].mT


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    gray = _GRAY_WEIGHTS[0] * red + _GRAY_WEIGHTS[1] * green + _GRAY_WEIGHTS[2] * blue
    return gray[:, None]


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _draw_view(
    photometry: str, number: int, config: ViewConfig, seed: int, epoch: int, indices: npt.NDArray[np.int64]
) -> Tensor:
    draws = uniform(seed, epoch, indices, photometry_stream(number), 10)  # [B, 10]
    colour = photometry == "mocov2"
    spreads = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    factors = np.array([1, 1, 1, 0]) + spreads * (2 * draws[:, 4:8] - 1)
    order = _JITTER_ORDERS[(draws[:, 8] * len(_JITTER_ORDERS)).astype(np.int64)]
    others = [
        (draws[:, 0] < config.jitter_probability) & colour,
        (draws[:, 1] < config.grayscale_probability) & colour,
        (draws[:, 2] < config.blur_probability) & colour,
        (draws[:, 3] < config.flip_probability) & (photometry != "none"),
        config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * draws[:, 9],
    ]
    return torch.from_numpy(np.column_stack((factors, order, *others)).astype(np.float64))
