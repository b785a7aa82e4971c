"""The numba kernel against Pillow: equal to the last bit, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines.box_resize import resize_box, scratch_size
from tests.pipelines.pictures import picture

CASES = [
    (1, 1, (0, 0, 1, 1), 1),
    (1, 1, (0, 0, 1, 1), 32),
    (1, 50, (0, 0, 1, 50), 16),
    (50, 1, (0, 0, 50, 1), 16),
    (2, 3, (1, 1, 1, 2), 7),
    (31, 33, (0, 0, 31, 33), 33),
    (33, 31, (0, 0, 32, 31), 32),
    (64, 64, (3, 5, 24, 24), 24),
    (40, 70, (7, 11, 33, 59), 224),
    (300, 200, (0, 0, 300, 200), 16),
    (300, 200, (13, 1, 287, 199), 17),
    (375, 500, (0, 0, 375, 500), 224),
    (375, 500, (100, 200, 275, 300), 224),
    (1500, 40, (0, 0, 1500, 40), 5),
    (40, 1500, (0, 0, 40, 1500), 1),
]
"""Height and width of the image, the box as (top, left, height, width), side of the output."""


def by_pillow(pixels: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    top, left, height, width = box
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    narrow = crop.resize((size, height), Image.Resampling.BILINEAR)
    return np.asarray(narrow.resize((size, size), Image.Resampling.BILINEAR))


def by_numba(pixels: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """With scratch of exactly the size that is asked for, full of garbage, and borders that show what is overrun."""
    flat = pixels.reshape(-1).copy()
    needed = scratch_size(box[2], box[3], size)
    scratch = np.full(needed + 64, 0xDEADBEEF, dtype=np.uint32)
    output = np.full(size * size * 3 + 64, 77, dtype=np.uint8)
    resize_box(flat, pixels.shape[1], *box, size, output[:-64], scratch[:needed])
    assert (output[-64:] == 77).all()
    assert (scratch[needed:] == 0xDEADBEEF).all()
    return output[:-64].reshape(size, size, 3)


@pytest.mark.parametrize("kind", ["noise", "black and white", "waves"])
@pytest.mark.parametrize(("height", "width", "box", "size"), CASES)
def test_equals_pillow(height: int, width: int, box: tuple[int, int, int, int], size: int, kind: str) -> None:
    pixels = picture(height, width, kind, seed=height + width)
    assert np.array_equal(by_numba(pixels, box, size), by_pillow(pixels, box, size))


def test_equals_pillow_at_random() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 150, 2).tolist()
        box_height, box_width = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = int(rng.integers(0, height - box_height + 1)), int(rng.integers(0, width - box_width + 1))
        size = int(rng.integers(1, 80))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        box = (top, left, box_height, box_width)
        assert np.array_equal(by_numba(pixels, box, size), by_pillow(pixels, box, size)), (height, width, box, size)
