"""What test_crop_resize.py asks of the other implementations, asked of Triton's, at sizes for Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported: test_crop_resize_triton.py runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import crop_resize_triton as compiled
from pipelines.crop_resize import PackedImages, crop_resize
from pipelines.crops import Boxes, full_image_boxes
from tests.pipelines.pictures import picture
from tests.pipelines.test_crop_resize import in_single_passes, pack, random_boxes


def resized(images: PackedImages, rows: np.ndarray, boxes: Boxes, size: int) -> np.ndarray:
    return crop_resize(images, rows, boxes, size, impl="triton").numpy()


def by_pillow(pixels: np.ndarray, boxes: Boxes, size: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.stack([in_single_passes(image, box, size) for box in boxes.tolist()])


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "size", "kind"),
    [
        (33, 65, 32, "noise"),
        (32, 32, 32, "waves"),
        (40, 70, 17, "black and white"),
        (7, 5, 33, "noise"),
        (1, 100, 32, "noise"),
        (100, 1, 32, "noise"),
        (1, 1, 7, "noise"),
        (3, 3, 1, "noise"),
        (30, 150, 2, "black and white"),
        (9, 11, 65, "noise"),
        *(
            pytest.param(*sizes, kind, marks=pytest.mark.long)
            for sizes in ((300, 200, 64), (200, 300, 123), (900, 60, 5), (60, 900, 5))
            for kind in ("noise", "waves", "black and white")
        ),
    ],
)
def test_equals_pillow(height: int, width: int, size: int, kind: str, planar: bool) -> None:
    pixels, boxes = picture(height, width, kind), random_boxes(height, width, 3)
    ours = resized(pack(pixels, planar=planar), np.zeros(3, dtype=np.int64), boxes, size)
    assert ours.shape == (3, size, size, 3)
    assert np.array_equal(ours, by_pillow(pixels, boxes, size))


@pytest.mark.long
def test_a_photograph_s_size() -> None:
    pixels = picture(375, 500, "waves")
    boxes = np.array([[0, 0, 375, 500], [20, 31, 260, 200], [300, 400, 75, 100]], dtype=np.int32)
    ours = resized(pack(pixels), np.zeros(3, dtype=np.int64), boxes, 224)
    assert np.array_equal(ours, by_pillow(pixels, boxes, 224))


@pytest.mark.parametrize("planar", [False, True])
def test_sums_over_many_pixels_are_exact(planar: bool) -> None:
    pixels = np.full((3, 400, 3), 255, dtype=np.uint8)
    pixels[1] = picture(1, 400)
    boxes = full_image_boxes(np.array([3]), np.array([400]))
    ours = resized(pack(pixels, planar=planar), np.array([0]), boxes, 3)
    assert np.array_equal(ours, by_pillow(pixels, boxes, 3))


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_flat_image_stays_flat(value: int) -> None:
    pixels = np.full((37, 53, 3), value, dtype=np.uint8)
    assert (resized(pack(pixels), np.zeros(4, dtype=np.int64), random_boxes(37, 53, 4), 5) == value).all()


def test_exact_halves_round_up() -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[..., 0] = [[1, 2], [1, 2]]  # mean 1.5
    pixels[..., 1] = [[0, 0], [1, 1]]  # mean 0.5, in the second pass
    whole = full_image_boxes(np.array([2]), np.array([2]))
    assert resized(pack(pixels), np.array([0]), whole, 1).tolist() == [[[[2, 1, 0]]]]


class TestManyBoxes:
    images = (picture(53, 31, seed=1), picture(1, 40, seed=2), picture(60, 40, "waves", seed=3), picture(5, 8, seed=4))

    def arguments(self, *, planar: bool = False) -> tuple[PackedImages, np.ndarray, Boxes]:
        rows = np.repeat(np.arange(len(self.images)), 4)
        boxes = np.concatenate([random_boxes(*image.shape[:2], 4, seed) for seed, image in enumerate(self.images)])
        shuffle = np.random.default_rng(0).permutation(len(rows))
        return pack(*self.images, planar=planar), rows[shuffle], boxes[shuffle]

    @pytest.mark.parametrize("planar", [False, True])
    def test_from_its_own_image(self, planar: bool) -> None:
        packed, rows, boxes = self.arguments(planar=planar)
        theirs = [
            in_single_passes(Image.fromarray(self.images[row]), box, 20)
            for row, box in zip(rows, boxes.tolist(), strict=True)
        ]
        assert np.array_equal(resized(packed, rows, boxes, 20), np.stack(theirs))

    def test_any_scratch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        packed, rows, boxes = self.arguments()
        expected = crop_resize(packed, rows, boxes, 9, impl="numba").numpy()
        for scratch_bytes in (1, 3000):
            monkeypatch.setattr(compiled, "_SCRATCH_BYTES", scratch_bytes)
            assert np.array_equal(resized(packed, rows, boxes, 9), expected)

    @pytest.mark.parametrize("limit", [1, 500, 10_000, 1 << 40])
    def test_chunks_hold_each_box_once_and_stay_small(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "_SCRATCH_BYTES", limit)
        sizes = np.random.default_rng(0).integers(1, 3000, 50)
        chunks = list(compiled._chunks(sizes))
        assert [number for first, stop in chunks for number in range(first, stop)] == list(range(50))
        assert all(stop == first + 1 or sizes[first:stop].sum() <= limit for first, stop in chunks)

    def test_three_launches(self) -> None:
        packed, rows, boxes = self.arguments()
        output = torch.empty(len(rows), 20, 20, 3, dtype=torch.uint8)
        names = [launch.kernel.fn.__name__ for launch in compiled.launches(packed, rows, boxes, output)]
        assert names == ["_crop_resize_weights", "_crop_resize_rows", "_crop_resize_columns"]


def test_no_boxes() -> None:
    packed = pack(picture(4, 4))
    ours = resized(packed, np.empty(0, dtype=np.int64), np.empty((0, 4), dtype=np.int32), 8)
    assert ours.shape == (0, 8, 8, 3)
    assert ours.dtype == np.uint8


def test_an_image_far_behind_in_the_buffer() -> None:
    """Places count in int64: a device buffer holds more than 2**31 bytes."""
    pixels = picture(6, 7)
    for planar in (False, True):
        near = pack(pixels, planar=planar)
        buffer = torch.empty(2**31 + pixels.size, dtype=torch.uint8)  # never touched but at its end
        buffer[2**31 :] = near.pixels
        boxes, rows = random_boxes(6, 7, 4), np.zeros(4, dtype=np.int64)
        far = replace(near, pixels=buffer, offsets=np.array([2**31]))
        assert np.array_equal(resized(far, rows, boxes, 8), by_pillow(pixels, boxes, 8))


def test_what_it_cannot_take() -> None:
    packed, rows, boxes = pack(picture(4, 4)), np.array([0]), np.array([[0, 0, 4, 4]], dtype=np.int32)
    with pytest.raises(ValueError, match=r"the images are on meta, and it needs a CUDA device; choose impl auto"):
        resized(replace(packed, pixels=packed.pixels.to("meta")), rows, boxes, 8)
    with pytest.raises(ValueError, match=r"one row of uint8 without gaps, and this is torch.float32 \[48\]"):
        resized(replace(packed, pixels=packed.pixels.float()), rows, boxes, 8)
    with pytest.raises(ValueError, match=r"box 0 is \[0, 0, 4, 5\]"):
        resized(packed, rows, boxes + np.array([0, 0, 0, 1], dtype=np.int32), 8)
