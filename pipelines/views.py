"""View recipes: which views of an image a method looks at, and how each is cut out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines import crops
from pipelines.config import ViewConfig
from pipelines.counter_rng import crop_stream

Geometry = Literal["original", "random_resized_crop", "center_crop"]
Photometry = Literal["mocov2", "flip", "none"]


@dataclass(frozen=True, slots=True)
class View:
    """One view of an image.

    ``number`` selects the random streams. LeOCLR's crops and MoCo-v2's crops have the same numbers, so that both
    methods are compared on exactly the same crops.
    """

    name: str
    geometry: Geometry
    photometry: Photometry
    number: int


ViewRecipe = tuple[View, ...]

_CROP_1 = View("crop 1", "random_resized_crop", "mocov2", number=1)
_CROP_2 = View("crop 2", "random_resized_crop", "mocov2", number=2)

LEOCLR_VIEWS: ViewRecipe = (View("original", "original", "mocov2", number=0), _CROP_1, _CROP_2)
"""The uncropped original for the query encoder, two crops for the momentum encoder (Algorithm 1 of the paper)."""

MOCOV2_VIEWS: ViewRecipe = (_CROP_1, _CROP_2)
"""One crop for the query encoder, one for the momentum encoder."""

LINEAR_TRAIN_VIEWS: ViewRecipe = (View("crop", "random_resized_crop", "flip", number=1),)
"""A random crop with a random flip: training of a linear classifier."""

CENTER_CROP_VIEWS: ViewRecipe = (View("center crop", "center_crop", "none", number=0),)
"""The central square of the resized image, as it is: evaluation."""


def draw_boxes(
    views: ViewRecipe,
    config: ViewConfig,
    heights: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    indices: npt.NDArray[np.int64],
) -> crops.Boxes:
    """Placed boxes of all views: int32 [B, V, 8], see `pipelines.crops`.

    heights, widths, indices: int64 [B]. A pure function of (seed, epoch, index, view) and the image's size.
    """
    boxes, side = np.empty((len(indices), len(views), 8), dtype=np.int32), config.image_size
    for column, view in enumerate(views):
        geometry = config.original if view.geometry == "original" else view.geometry
        if geometry == "squash":
            boxes[:, column] = crops.squashed(crops.full_image_boxes(heights, widths), side)
        elif geometry == "pad":
            boxes[:, column] = crops.padded(heights, widths, side)
        elif geometry == "center_crop":
            shorter = side if view.geometry == "original" else round(side / config.center_crop_fraction)
            boxes[:, column] = crops.center_crops(heights, widths, side, shorter)
        else:
            draws = crops.random_resized_crop_draws(seed, epoch, indices, crop_stream(view.number))
            cut = crops.random_resized_crop_boxes(heights, widths, draws, config.crop_scale, config.crop_ratio)
            boxes[:, column] = crops.squashed(cut, side)
    return boxes
