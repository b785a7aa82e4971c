from __future__ import annotations

import numpy as np
import pytest

from pipelines.config import ViewConfig
from pipelines.counter_rng import crop_stream
from pipelines.crops import (
    Boxes,
    center_crops,
    full_image_boxes,
    padded,
    random_resized_crop_boxes,
    random_resized_crop_draws,
    squashed,
)
from pipelines.views import CENTER_CROP_VIEWS, LEOCLR_VIEWS, MOCOV2_VIEWS, View, draw_boxes

HEIGHTS, WIDTHS, INDICES = np.array([500, 37, 96, 500]), np.array([375, 300, 96, 375]), np.array([0, 7, 3, 12])


def boxes_of(views: tuple[View, ...], seed: int = 0, epoch: int = 0, config: ViewConfig | None = None) -> Boxes:
    return draw_boxes(views, config or ViewConfig(), HEIGHTS, WIDTHS, seed, epoch, INDICES)


def test_boxes_of_each_geometry() -> None:
    boxes = boxes_of(LEOCLR_VIEWS, seed=2, epoch=5)
    assert boxes.shape == (4, 3, 8)
    assert boxes.dtype == np.int32
    assert np.array_equal(boxes[:, 0], squashed(full_image_boxes(HEIGHTS, WIDTHS), 224))
    for column in (1, 2):
        draws = random_resized_crop_draws(2, 5, INDICES, crop_stream(LEOCLR_VIEWS[column].number))
        expected = random_resized_crop_boxes(HEIGHTS, WIDTHS, draws, (0.2, 1.0), (3 / 4, 4 / 3))
        assert np.array_equal(boxes[:, column], squashed(expected, 224))
    assert np.array_equal(boxes_of(CENTER_CROP_VIEWS)[:, 0], center_crops(HEIGHTS, WIDTHS, 224, 256))


@pytest.mark.parametrize("original", ["pad", "center_crop"])
def test_the_original_s_geometry_is_an_option(original: str) -> None:
    """Of the original alone; the crops and the evaluation stay."""
    config = ViewConfig(original=original)  # type: ignore[arg-type]
    boxes, plain = boxes_of(LEOCLR_VIEWS, config=config), boxes_of(LEOCLR_VIEWS)
    sizes = HEIGHTS, WIDTHS, 224
    expected = padded(*sizes) if original == "pad" else center_crops(*sizes, 224)
    assert np.array_equal(boxes[:, 0], expected)
    assert np.array_equal(boxes[:, 1:], plain[:, 1:])
    assert np.array_equal(boxes_of(CENTER_CROP_VIEWS, config=config), boxes_of(CENTER_CROP_VIEWS))
    assert config.fill == (124, 116, 104)


def test_crops_differ_by_view_epoch_seed_and_index() -> None:
    boxes = [boxes_of(MOCOV2_VIEWS, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    leoclr = boxes_of(LEOCLR_VIEWS, seed=0, epoch=0)
    assert np.array_equal(leoclr[:, 1:], boxes[0])  # both methods are compared on the same crops
    of_one_size = np.concatenate([part[[0, 3]].reshape(-1, 8) for part in boxes])  # images 0 and 3
    assert len(np.unique(of_one_size, axis=0)) == len(of_one_size)


def test_boxes_are_the_same_for_ever() -> None:
    heights, widths = np.array([500, 37, 1]), np.array([375, 300, 9])
    boxes = draw_boxes(LEOCLR_VIEWS, ViewConfig(), heights, widths, 0, 0, np.arange(3))
    assert boxes[..., :4].tolist() == [
        [[0, 0, 500, 375], [57, 63, 324, 281], [46, 29, 430, 327]],
        [[0, 0, 37, 300], [0, 125, 37, 49], [0, 125, 37, 49]],
        [[0, 0, 1, 9], [0, 5, 1, 2], [0, 2, 1, 2]],
    ]
