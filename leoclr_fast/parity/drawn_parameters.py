"""What the data layer draws, beside the distributions that it should draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, draw_augmentation
from pipelines.config import ViewConfig
from pipelines.views import View, draw_boxes

Floats = npt.NDArray[np.float64]

_BINS = 20
_GRID = 1001
_IMAGE = 375, 500  # height and width, pixels: ImageNet's most frequent


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The density of a drawn quantity, and the one expected."""

    name: str
    unit: str
    centers: Floats
    density: Floats
    expected: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How often something happened in ``draws`` draws, and how often it should."""

    name: str
    draws: int
    share: float
    expected: float

    @property
    def deviation(self) -> float:
        """In standard deviations of the expected share; 0 where that is certain, and it is met."""
        spread = math.sqrt(self.expected * (1 - self.expected) / self.draws)
        off = self.share - self.expected
        return off / spread if spread else (0.0 if off == 0 else math.copysign(math.inf, off))


def drawn_parameters(
    views: tuple[View, ...], config: ViewConfig, *, seed: int, draws: int = 20_000
) -> tuple[list[Histogram], list[Share]]:
    """What is drawn for so many images of 500 x 375 pixels in epoch 0, over the views with that parameter.

    Area and aspect ratio of a box are uniform, the ratio in its logarithm, among the boxes that fit into the image: one
    that does not is drawn again. (That whole pixels are taken, and after ten trials the centre, is left out here.)
    The factors, the shift and sigma are uniform.
    """
    height, width = _IMAGE
    indices = np.arange(draws, dtype=np.int64)
    heights, widths = np.full(draws, height), np.full(draws, width)
    boxes = draw_boxes(views, config, heights, widths, seed, 0, indices)  # [N, V, 8]
    cropped = [number for number, view in enumerate(views) if view.geometry == "random_resized_crop"]
    sides = boxes[:, cropped, 2:4].reshape(-1, 2).astype(np.float64)
    drawn = draw_augmentation(views, config, seed, 0, indices)
    factors, jitter = drawn.factors.numpy(), drawn.jitter.numpy()
    histograms = []
    if cropped:
        area = sides.prod(axis=1) / (height * width)
        ratio = np.log(sides[:, 1] / sides[:, 0])
        fitting = _fitting_boxes(config)
        for name, values, expected in (
            ("Share of the image's area", area, fitting[:, 0]),
            ("Logarithm of width over height", ratio, fitting[:, 1]),
        ):
            histograms.append(_histogram(name, "", values, expected.min(), expected.max(), expected))
    for name, column, spread in (
        ("Brightness factor", BRIGHTNESS, config.brightness),
        ("Contrast factor", CONTRAST, config.contrast),
        ("Saturation factor", SATURATION, config.saturation),
    ):
        histograms.append(_histogram(name, "", factors[jitter, column], 1 - spread, 1 + spread))
    histograms.append(_histogram("Hue shift", " turns", factors[jitter, HUE], -config.hue, config.hue))
    histograms.append(_histogram("Blur sigma", " pixels", drawn.sigma.numpy()[drawn.blur.numpy()], *config.blur_sigma))
    samples = len(drawn.table)
    shares = [
        Share(name="jitter", draws=samples, share=float(jitter.mean()), expected=config.jitter_probability),
        _share("grayscale", drawn.grayscale.numpy(), config.grayscale_probability),
        _share("blur", drawn.blur.numpy(), config.blur_probability),
        _share("flip", drawn.flip.numpy(), config.flip_probability),
    ]
    first = drawn.order.numpy()[jitter, 0]
    for name, operation in (
        ("brightness", BRIGHTNESS),
        ("contrast", CONTRAST),
        ("saturation", SATURATION),
        ("hue", HUE),
    ):
        shares.append(_share(f"{name} first", first == operation, 0.25))
    return [histogram for histogram in histograms if len(histogram.centers)], shares


def _fitting_boxes(config: ViewConfig) -> Floats:
    """Area's share and logarithm of width over height of boxes that fit, on a fine grid: float64 [·, 2]."""
    height, width = _IMAGE
    shares = np.linspace(config.crop_scale[0], config.crop_scale[1], _GRID)
    logarithms = np.linspace(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), _GRID)
    area, ratio = np.meshgrid(shares, logarithms, indexing="ij")
    pixels = area * height * width
    fits = (np.sqrt(pixels * np.exp(ratio)) <= width) & (np.sqrt(pixels / np.exp(ratio)) <= height)
    return np.stack((area[fits], ratio[fits]), axis=1)


def _histogram(
    name: str, unit: str, values: Floats, low: float, high: float, sample: Floats | None = None
) -> Histogram:
    """From ``low`` to ``high``, against the density of ``sample``, else a uniform one; empty where nothing can vary."""
    if not len(values) or not low < high:
        nothing = np.empty(0)
        return Histogram(name=name, unit=unit, centers=nothing, density=nothing, expected=nothing)
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    density = counts / (len(values) * np.diff(edges))
    centers = (edges[:-1] + edges[1:]) / 2
    expected = np.full(_BINS, 1 / (high - low))
    if sample is not None:
        expected, _ = np.histogram(sample, bins=_BINS, range=(low, high), density=True)
    return Histogram(name=name, unit=unit, centers=centers, density=density, expected=expected)


def _share(name: str, happened: npt.NDArray[np.bool_], expected: float) -> Share:
    return Share(name=name, draws=len(happened), share=float(happened.mean()), expected=expected)
