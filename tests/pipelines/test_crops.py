"""Boxes: torchvision's algorithm draw for draw, and the image's borders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipelines.crops import (
    Boxes,
    center_crops,
    full_image_boxes,
    padded,
    random_resized_crop_boxes,
    random_resized_crop_draws,
    squashed,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SIDES = (1, 2, 3, 4, 7, 32, 37, 224, 500, 1023)
ALMOST_ONE = 1 - 2.0**-32


def boxes_of(height: int, width: int, draws: np.ndarray, scale=SCALE, ratio=RATIO) -> Boxes:
    sizes = (np.full(len(draws), side, dtype=np.int64) for side in (height, width))
    return random_resized_crop_boxes(*sizes, draws, scale, ratio)


def assert_inside(boxes: Boxes, height: int | np.ndarray, width: int | np.ndarray) -> None:
    top, left, box_height, box_width = boxes.T
    assert boxes.dtype == np.int32
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_height >= 1).all()
    assert (box_width >= 1).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


@pytest.fixture
def double_precision() -> Iterator[None]:
    """For torchvision, which else draws in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Replay:
    """Stands in for the random calls of torchvision's get_params and hands out given draws."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = draws.reshape(10, 4)
        self.num_uniform = self.num_randint = 0

    def uniform_(self, tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        attempt, column = divmod(self.num_uniform, 2)
        self.num_uniform += 1
        return tensor.fill_(float(low) + (float(high) - float(low)) * self.draws[attempt, column])

    def randint(self, low: int, high: int, size: tuple[int]) -> torch.Tensor:
        attempt, column = (self.num_uniform - 1) // 2, 2 + self.num_randint
        self.num_randint += 1
        return torch.full(size, low + int(self.draws[attempt, column] * (high - low)))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        (SCALE, RATIO),
        ((0.08, 1.0), RATIO),
        ((0.9, 1.0), (0.2, 0.3)),
        ((0.9, 1.0), (3.0, 4.0)),
        ((1.0, 1.0), (0.5, 2.0)),
    ],
)
def test_equals_torchvision_fed_the_same_draws(
    scale: tuple[float, float], ratio: tuple[float, float], monkeypatch: pytest.MonkeyPatch, double_precision: None
) -> None:
    sizes = np.array([(height, width) for height in SIDES for width in SIDES] * 4)
    draws = random_resized_crop_draws(0, 0, np.arange(len(sizes)), 16)
    boxes = random_resized_crop_boxes(*sizes.T, draws, scale, ratio)
    for (height, width), row, box in zip(sizes.tolist(), draws, boxes.tolist(), strict=True):
        replay = Replay(row)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high, r=replay: r.uniform_(tensor, low, high))
            patch.setattr(torch, "randint", replay.randint)
            theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
        if 0 in theirs[2:]:  # a crop without pixels, which torchvision cannot resize: ours has one
            theirs = [(height - 1) // 2, (width - 1) // 2, *(max(1, side) for side in theirs[2:])]
        assert box == list(theirs)


def test_the_fallback_is_the_largest_central_crop() -> None:
    never_fits = np.full((1, 40), ALMOST_ONE)  # the whole area at aspect 4 / 3: too wide for these
    assert boxes_of(100, 100, never_fits).tolist() == [[0, 0, 100, 100]]
    assert boxes_of(300, 60, never_fits).tolist() == [[110, 0, 80, 60]]
    assert boxes_of(1, 500, np.zeros((1, 40))).tolist() == [[0, 249, 1, 1]]
    assert boxes_of(500, 1, np.zeros((1, 40))).tolist() == [[249, 0, 1, 1]]
    assert boxes_of(60, 300, np.zeros((1, 40)), scale=(1.0, 1.0)).tolist() == [[0, 110, 60, 80]]


def test_boxes_stay_inside_images_of_any_size() -> None:
    sizes = np.array([(height, width) for height in (*range(1, 24), 500, 4001) for width in (*range(1, 24), 777)])
    for epoch in range(20):
        draws = random_resized_crop_draws(1, epoch, np.arange(len(sizes)), 18)
        assert_inside(random_resized_crop_boxes(*sizes.T, draws, SCALE, RATIO), *sizes.T)
        assert_inside(random_resized_crop_boxes(*sizes.T, draws, (1e-4, 1.0), (0.02, 50.0)), *sizes.T)
    for value in (0.0, ALMOST_ONE):
        extreme = np.full((len(sizes), 40), value)
        assert_inside(random_resized_crop_boxes(*sizes.T, extreme, SCALE, RATIO), *sizes.T)
        assert_inside(random_resized_crop_boxes(*sizes.T, extreme, (1e-4, 1e-4), (0.02, 50.0)), *sizes.T)


@pytest.mark.parametrize(
    ("height", "width", "evaluation", "center_crop", "pad"),
    [
        (500, 375, [341, 256, 58, 16], [298, 224, 37, 0], [224, 168, 0, -28]),
        (375, 500, [256, 341, 16, 58], [224, 298, 0, 37], [168, 224, -28, 0]),
        (256, 256, [256, 256, 16, 16], [224, 224, 0, 0], [224, 224, 0, 0]),
        (333, 335, [256, 257, 16, 16], [224, 225, 0, 0], [222, 224, -1, 0]),
        (300, 301, [256, 256, 16, 16], [224, 224, 0, 0], [223, 224, 0, 0]),
        (1, 1000, [256, 256_000, 16, 127_888], [224, 224_000, 0, 111_888], [1, 224, -111, 0]),
    ],
)
def test_where_a_view_lies_in_its_resized_image(
    height: int, width: int, evaluation: list[int], center_crop: list[int], pad: list[int]
) -> None:
    """torchvision's arithmetic: the longer side is rounded down, half a pixel of the corner to even."""
    sizes = np.array([height]), np.array([width])
    found = [center_crops(*sizes, 224, 256), center_crops(*sizes, 224, 224), padded(*sizes, 224)]
    assert [boxes.tolist() for boxes in found] == [[[0, 0, height, width, *e]] for e in (evaluation, center_crop, pad)]
    assert {boxes.dtype for boxes in found} == {np.dtype(np.int32)}
    assert squashed(full_image_boxes(*sizes), 224).tolist() == [[0, 0, height, width, 224, 224, 0, 0]]
