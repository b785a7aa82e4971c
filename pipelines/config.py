"""Settings of the data layer: `ViewConfig` changes the result, `LoaderConfig` changes only the speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from dataset_tools.limits import Positive, Seconds, Share, require_allowed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Original = Literal["squash", "pad", "center_crop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """How a view is cropped, augmented and normalised. The defaults are MoCo-v2's."""

    image_size: Annotated[int, Meta(ge=1, le=4096)] = 224
    """Side of a view, pixels."""
    original: Original = "squash"
    """How LeOCLR's uncropped original becomes a square. squash: the whole image is resized to it, whatever its aspect.
    pad: its longer side is, and the mean colour lies around it. center_crop: its shorter side is, and the middle is
    kept."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of a random crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a random crop's width / height."""
    jitter_probability: Share = 0.8
    """Probability that brightness, contrast, saturation and hue are jittered, in random order."""
    brightness: Share = 0.4
    """The brightness factor is drawn from 1 - brightness to 1 + brightness."""
    contrast: Share = 0.4
    """The contrast factor is drawn from 1 - contrast to 1 + contrast."""
    saturation: Share = 0.4
    """The saturation factor is drawn from 1 - saturation to 1 + saturation."""
    hue: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    """The hue shift is drawn from -hue to +hue, in turns of the colour circle."""
    grayscale_probability: Share = 0.2
    """Probability that a view loses its colour."""
    blur_probability: Share = 0.5
    """Probability of a Gaussian blur. The recipes for 32-pixel images set 0."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels of the view. The blur is Pillow's, which MoCo-v2 used: three boxes
    one after the other, whose variances add up to sigma squared at every sigma and size, here without its rounding to
    8 bits. (SimCLR's is a Gaussian of as many taps as a tenth of the side.)"""
    flip_probability: Share = 0.5
    """Probability of a left-right flip."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, values in [0, 1]."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    """Each channel is divided by it."""
    center_crop_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.875
    """Evaluation: side of the central square over that of the resized image's shorter side (224 / 256 = 0.875), as
    torchvision's Resize(256) and CenterCrop(224)."""

    def __post_init__(self) -> None:
        require_allowed(self)
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop scale {self.crop_scale} is not allowed: give 0 < lowest <= highest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop ratio {self.crop_ratio} is not allowed: give 0 < lowest <= highest")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur sigma {self.blur_sigma} is not allowed: give 0 < lowest <= highest")

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, 0 to 255: what lies around a view that its image does not fill."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in self.mean)
        return red, green, blue


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """Which loader runs and how: nothing here changes a single pixel, except between backends by their decoders."""

    name: str = "auto"
    """auto, resident, dali, nvjpeg, ffcv, torchvision, synthetic, or one added to `pipelines.factory.LOADERS`."""
    workers: Annotated[int, Meta(ge=0, le=4096)] | None = None
    """Worker threads (resident, dali, nvjpeg, ffcv) or processes (torchvision); by default the machine's cores, shared
    by its ranks."""
    prefetch_batches: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Batches that each worker process prepares ahead (torchvision); that are decoded ahead, beside as many that are
    read ahead (ffcv, nvjpeg, dali)."""
    resident_limit_gib: Annotated[float, Meta(ge=0)] = 8.0
    """auto: data sets that decode to at most this much stay resident on the device."""
    hw_decoder_load: Share = 0.65
    """dali on a GPU: the share of the JPEGs that its hardware decoder is given, where it has one."""
    stall_timeout_s: Seconds = 300.0
    """An error when no batch has come for so long. (Errors, and dead processes, are noticed at once.)"""

    def __post_init__(self) -> None:
        require_allowed(self)
