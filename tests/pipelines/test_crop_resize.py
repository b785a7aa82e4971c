"""Crops against Pillow's, bit for bit, and against themselves: one box or many; by torch and by numba.

Up to version 12 Pillow resizes horizontally, then vertically, with uint8 in between, and so do we. From 13 on it
goes the other way for a box that shrinks more in height, which moves single pixels by one level. Asking Pillow for
one side at a time fixes the order on any version.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.sources import open_source
from pipelines import crop_resize as module
from pipelines.crop_resize import Impl, PackedImages, crop_resize
from pipelines.crops import Boxes, full_image_boxes, random_resized_crop_boxes, random_resized_crop_draws
from pipelines.decode import decode_rgb
from tests.pipelines.pictures import picture
from tests.tolerances import CROP_RESIZE, Tolerance

BILINEAR = Image.Resampling.BILINEAR


CPU_IMPLS: tuple[Impl, ...] = ("torch", "numba")


def pack(*images: np.ndarray, planar: bool = False) -> PackedImages:
    flat = [(image.transpose(2, 0, 1) if planar else image).reshape(-1) for image in images]
    return PackedImages(
        pixels=torch.from_numpy(np.concatenate(flat)),
        offsets=np.cumsum([0, *(image.size for image in images[:-1])]),
        heights=np.array([image.shape[0] for image in images]),
        widths=np.array([image.shape[1] for image in images]),
        planar=planar,
    )


def random_boxes(height: int, width: int, count: int, seed: int = 0) -> Boxes:
    """The whole image, a single pixel, and boxes of any size and place."""
    rng = np.random.default_rng(seed)
    heights, widths = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    heights[:2], widths[:2] = (height, 1), (width, 1)
    tops, lefts = rng.integers(0, height - heights + 1), rng.integers(0, width - widths + 1)
    return np.stack((tops, lefts, heights, widths), axis=-1).astype(np.int32)


def in_one_call(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    top, left, height, width = box
    return np.asarray(image.crop((left, top, left + width, top + height)).resize((size, size), BILINEAR))


def in_single_passes(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, height), BILINEAR).resize((size, size), BILINEAR))


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: Tolerance) -> None:
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= tolerance.max
    assert difference.mean() <= tolerance.mean


SIZES = [
    *((500, 375, 224), (40, 30, 224), (64, 64, 32), (33, 65, 32), (96, 96, 96), (32, 32, 32)),
    *((7, 5, 33), (1023, 17, 96), (17, 1023, 96), (1200, 1600, 32), (123, 507, 31)),
    *((1, 500, 32), (500, 1, 32), (1, 1, 7), (3, 3, 1), (2, 3000, 5)),
]


@pytest.mark.parametrize("kind", ["noise", "black and white", "waves"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_equals_pillow(height: int, width: int, size: int, kind: str) -> None:
    pixels, boxes = picture(height, width, kind), random_boxes(height, width, 8)
    image = Image.fromarray(pixels)
    expected = np.stack([in_single_passes(image, box, size) for box in boxes.tolist()])
    for impl in CPU_IMPLS:
        ours = crop_resize(pack(pixels), np.zeros(8, dtype=np.int64), boxes, size, impl=impl).numpy()
        assert ours.shape == (8, size, size, 3)
        assert np.array_equal(ours, expected), impl
    assert_close(ours, np.stack([in_one_call(image, box, size) for box in boxes.tolist()]), CROP_RESIZE)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_box_of_the_output_s_size_is_copied(impl: Impl) -> None:
    pixels = picture(100, 120)
    boxes = np.array([[0, 0, 32, 32], [68, 88, 32, 32], [11, 13, 32, 32]], dtype=np.int32)
    ours = crop_resize(pack(pixels), np.zeros(3, dtype=np.int64), boxes, 32, impl=impl)
    for (top, left, height, width), crop in zip(boxes.tolist(), ours.numpy(), strict=True):
        assert np.array_equal(crop, pixels[top : top + height, left : left + width])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_exact_halves_round_up(impl: Impl) -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[..., 0] = [[1, 2], [1, 2]]  # mean 1.5
    pixels[..., 1] = [[0, 0], [1, 1]]  # mean 0.5, in the second pass
    whole = full_image_boxes(np.array([2]), np.array([2]))
    assert crop_resize(pack(pixels), np.array([0]), whole, 1, impl=impl).tolist() == [[[[2, 1, 0]]]]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_flat_image_stays_flat(value: int, impl: Impl) -> None:
    pixels = np.full((37, 53, 3), value, dtype=np.uint8)
    ours = crop_resize(pack(pixels), np.zeros(9, dtype=np.int64), random_boxes(37, 53, 9), 17, impl=impl)
    assert (ours == value).all()


class TestManyBoxes:
    """Boxes of one call do not touch one another, however they are grouped."""

    images = (picture(53, 31, seed=1), picture(1, 40, seed=2), picture(90, 90, "waves", seed=3), picture(5, 8, seed=4))

    def arguments(self) -> tuple[PackedImages, np.ndarray, Boxes]:
        rows = np.repeat(np.arange(len(self.images)), 7)
        boxes = np.concatenate([random_boxes(*image.shape[:2], 7, seed) for seed, image in enumerate(self.images)])
        shuffle = np.random.default_rng(0).permutation(len(rows))
        return pack(*self.images), rows[shuffle], boxes[shuffle]

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_one_by_one(self, impl: Impl) -> None:
        packed, rows, boxes = self.arguments()
        together = crop_resize(packed, rows, boxes, 24, impl=impl)
        for number in range(len(rows)):
            alone = crop_resize(packed, rows[number : number + 1], boxes[number : number + 1], 24, impl=impl)
            assert torch.equal(together[number], alone[0])

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("planar", [False, True])
    def test_from_its_own_image(self, planar: bool, impl: Impl) -> None:
        _, rows, boxes = self.arguments()
        packed = pack(*self.images, planar=planar)
        sources = [Image.fromarray(self.images[row]) for row in rows]
        theirs = [in_single_passes(image, box, 24) for image, box in zip(sources, boxes.tolist(), strict=True)]
        assert np.array_equal(crop_resize(packed, rows, boxes, 24, impl=impl).numpy(), np.stack(theirs))

    @pytest.mark.parametrize("max_elements", [1, 5_000, 1 << 40])
    def test_any_chunks(self, max_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        packed, rows, boxes = self.arguments()
        expected = crop_resize(packed, rows, boxes, 24, impl="numba")
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": max_elements})
        assert torch.equal(crop_resize(packed, rows, boxes, 24, impl="torch"), expected)

    @pytest.mark.parametrize("max_elements", [1, 5_000, 20_000, 1 << 40])
    def test_chunks_hold_each_box_once_and_stay_small(self, max_elements: int) -> None:
        _, _, boxes = self.arguments()
        chunks = module._chunks_of_similar_size(boxes, 24, max_elements)
        assert sorted(np.concatenate(chunks).tolist()) == list(range(len(boxes)))
        for chunk in chunks:
            height, width = np.maximum(boxes[chunk, 2:].max(axis=0), 24)
            assert len(chunk) == 1 or len(chunk) * 3 * height * width <= max_elements


def test_nothing_is_read_back_from_the_device() -> None:
    """The meta device holds no values: whatever asked for one would raise."""
    packed = pack(picture(20, 30))
    on_device = replace(packed, pixels=packed.pixels.to("meta"))
    ours = crop_resize(on_device, np.zeros(5, dtype=np.int64), random_boxes(20, 30, 5), 8)
    assert ours.shape == (5, 8, 8, 3)
    assert ours.device.type == "meta"


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_no_boxes(impl: Impl) -> None:
    packed = pack(picture(4, 4))
    ours = crop_resize(packed, np.empty(0, dtype=np.int64), np.empty((0, 4), dtype=np.int32), 8, impl=impl)
    assert ours.shape == (0, 8, 8, 3)
    assert ours.dtype == torch.uint8


@pytest.mark.parametrize("size", [1, 5, 32, 224])
def test_weights_are_exact_in_tf32(size: int) -> None:
    """Integers of at most 11 bits, so that any device's float32 product is exact."""
    sides = torch.tensor([1, 2, 7, 31, 224, 225, 500, 1023])
    high, low = module._resize_weights(sides, 1023, size)
    assert high.dtype == low.dtype == torch.float32
    assert torch.equal(high, high.round())
    assert torch.equal(low, low.round())
    assert high.min() >= 0
    assert high.max() <= 2**11
    assert low.abs().max() <= 2**10
    weights = (2.0**11 * high.double() + low.double()) / 2.0**22
    assert weights.min() >= 0
    taps = (weights > 0).sum(dim=2)
    assert ((weights.sum(dim=2) - 1).abs() <= taps * 2.0**-23).all()
    outside = torch.arange(1023) >= sides[:, None, None]
    assert (weights * outside).max() == 0


def test_an_image_far_behind_in_the_buffer() -> None:
    """Offsets count in int64: a device buffer holds more than 2**31 bytes."""
    pixels = picture(6, 7)
    packed = PackedImages(
        pixels=torch.empty(2**31 + pixels.size, dtype=torch.uint8),  # never touched but at its end
        offsets=np.array([2**31]),
        heights=np.array([6]),
        widths=np.array([7]),
    )
    packed.pixels[2**31 :] = torch.from_numpy(pixels.reshape(-1))
    boxes = random_boxes(6, 7, 4)
    expected = crop_resize(pack(pixels), np.zeros(4, dtype=np.int64), boxes, 8)
    for impl in CPU_IMPLS:
        assert torch.equal(crop_resize(packed, np.zeros(4, dtype=np.int64), boxes, 8, impl=impl), expected)


class TestWhatIsNotThere:
    """Compiled code checks no place in memory: what is outside is refused before."""

    @pytest.mark.parametrize("impl", ["auto", *CPU_IMPLS])
    @pytest.mark.parametrize(
        "box", [[0, 0, 5, 3], [0, 0, 4, 4], [-1, 0, 2, 2], [0, -1, 2, 2], [3, 0, 2, 1], [0, 2, 1, 2], [0, 0, 0, 1]]
    )
    def test_a_box_that_leaves_its_image(self, box: list[int], impl: Impl) -> None:
        packed = pack(picture(9, 9), picture(4, 3))
        boxes = np.array([[0, 0, 9, 9], box], dtype=np.int32)
        with pytest.raises(ValueError, match=r"box 1 is \[.*\] as \(top, left, height, width\), .* 4 x 3 pixels"):
            crop_resize(packed, np.array([0, 1]), boxes, 8, impl=impl)

    def test_an_image_that_leaves_the_buffer(self) -> None:
        packed = pack(picture(9, 9), picture(4, 3))
        boxes = full_image_boxes(packed.heights, packed.widths)
        for offsets, wrong in (([0, 244], 1), ([-1, 243], 0)):
            with pytest.raises(ValueError, match=rf"image {wrong} of .* does not end within the buffer of 279 bytes"):
                crop_resize(replace(packed, offsets=np.array(offsets)), np.array([0, 1]), boxes, 8)


@pytest.mark.real_data
def test_real_photographs(real_data: Path) -> None:
    split = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
    for index in range(0, len(split), 16):
        image = decode_rgb(split, index)
        sizes = np.full(3, image.height), np.full(3, image.width)
        draws = random_resized_crop_draws(0, 0, np.arange(3) + 3 * index, 16)
        boxes = random_resized_crop_boxes(*sizes, draws, (0.2, 1.0), (3 / 4, 4 / 3))
        boxes[2] = full_image_boxes(*sizes)[2]
        expected = np.stack([in_single_passes(image, box, 224) for box in boxes.tolist()])
        for impl in CPU_IMPLS:
            ours = crop_resize(pack(np.asarray(image)), np.zeros(3, dtype=np.int64), boxes, 224, impl=impl).numpy()
            assert np.array_equal(ours, expected), impl
        assert_close(ours, np.stack([in_one_call(image, box, 224) for box in boxes.tolist()]), CROP_RESIZE)
