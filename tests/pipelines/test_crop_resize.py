"""Crops against Pillow's, bit for bit, and against themselves: one box or many; by each implementation.

Up to version 12 Pillow resizes horizontally, then vertically, with uint8 in between, and so do we. From 13 on it
goes the other way for a box that shrinks more in height, which moves single pixels by one level. Asking Pillow for
one side at a time fixes the order on any version.

Triton reads TRITON_INTERPRET when it is imported: its kernels meet `TestEachImplementation` in a process of its own, at
sizes for its interpreter (`test_triton_interpreter`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from dataset_tools.sources import open_source
from pipelines import crop_resize as module
from pipelines.crop_resize import crop_resize
from pipelines.crop_resize_numba import box_geometry, compiled_kernel, crop_resize_numba, packed, scratch_size
from pipelines.crops import (
    Boxes,
    center_crops,
    full_image_boxes,
    padded,
    squashed,
)
from pipelines.decode import decode_rgb
from pipelines.kernels import Impl
from pipelines.packed_images import PackedImages
from tests.pipelines.oracle import cut
from tests.pipelines.pictures import picture
from tests.tolerances import RESIZE_AND_CENTER_CROP, Tolerance

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS: tuple[Impl, ...] = ("triton",) if INTERPRETED else ("torch", "numba")
FILL = (124, 116, 104)
each = pytest.mark.parametrize("impl", IMPLS)
LAYOUTS = [(impl, False) for impl in IMPLS] + [(impl, True) for impl in IMPLS if impl != "numba"]
each_layout = pytest.mark.parametrize(("impl", "planar"), LAYOUTS)


def pack(*images: np.ndarray, planar: bool = False) -> PackedImages:
    flat = [(image.transpose(2, 0, 1) if planar else image).reshape(-1) for image in images]
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    return PackedImages.side_by_side(torch.from_numpy(np.concatenate(flat)), heights, widths, planar=planar)


def random_boxes(height: int, width: int, count: int, seed: int = 0) -> Boxes:
    """The whole image, a single pixel, and boxes of any size and place."""
    rng = np.random.default_rng(seed)
    heights, widths = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    heights[:2], widths[:2] = (height, 1), (width, 1)
    tops, lefts = rng.integers(0, height - heights + 1), rng.integers(0, width - widths + 1)
    return np.stack((tops, lefts, heights, widths), axis=-1).astype(np.int32)


def in_single_passes(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    return np.asarray(cut(image, box if len(box) == 8 else [*box, size, size, 0, 0], size, FILL))


def by_pillow(pixels: np.ndarray, boxes: Boxes, size: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.stack([in_single_passes(image, box, size) for box in boxes.tolist()])


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: Tolerance) -> None:
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= tolerance.max
    assert difference.mean() <= tolerance.mean


KINDS = ("noise", "black and white", "waves")
SIZES = [
    *((500, 375, 224), (40, 30, 224), (64, 64, 32), (33, 65, 32), (96, 96, 96), (32, 32, 32)),
    *((7, 5, 33), (1023, 17, 96), (17, 1023, 96), (1200, 1600, 32), (123, 507, 31)),
    *((1, 500, 32), (500, 1, 32), (1, 1, 7), (3, 3, 1), (2, 3000, 5), (700, 40, 1), (40, 2500, 3)),
]
"""Height and width of an image, side of the output."""
CASES = [(*sizes, kind) for sizes in SIZES for kind in KINDS]
INTERPRETED_CASES = [
    *((33, 65, 32, "noise"), (32, 32, 32, "waves"), (40, 70, 17, "black and white"), (7, 5, 33, "noise")),
    *((1, 100, 32, "noise"), (100, 1, 32, "noise"), (1, 1, 7, "noise"), (3, 3, 1, "noise"), (3, 400, 3, "noise")),
    *((30, 150, 2, "black and white"), (9, 11, 65, "noise")),
    *(
        pytest.param(*sizes, kind, marks=pytest.mark.long)
        for sizes in ((300, 200, 64), (200, 300, 123), (900, 60, 5), (60, 900, 5))
        for kind in KINDS
    ),
    pytest.param(375, 500, 224, "waves", marks=pytest.mark.long),
]


class TestEachImplementation:
    images = (picture(53, 31, seed=1), picture(1, 40, seed=2), picture(60, 40, "waves", seed=3), picture(5, 8, seed=4))

    def many_boxes(self, *, planar: bool = False) -> tuple[PackedImages, np.ndarray, Boxes]:
        rows = np.repeat(np.arange(len(self.images)), 4)
        boxes = np.concatenate([random_boxes(*image.shape[:2], 4, seed) for seed, image in enumerate(self.images)])
        shuffle = np.random.default_rng(0).permutation(len(rows))
        return pack(*self.images, planar=planar), rows[shuffle], boxes[shuffle]

    @pytest.mark.parametrize(("height", "width", "size", "kind"), INTERPRETED_CASES if INTERPRETED else CASES)
    @each_layout
    def test_equals_pillow(self, impl: Impl, planar: bool, height: int, width: int, size: int, kind: str) -> None:
        """Up to 2500 source pixels for one, where float32 would no longer be enough."""
        count = 3 if INTERPRETED else 8
        pixels, boxes = picture(height, width, kind), random_boxes(height, width, count)
        packed = pack(pixels, planar=planar)
        ours = crop_resize(packed, np.zeros(count, dtype=np.int64), boxes, size, impl=impl).numpy()
        assert ours.shape == (count, size, size, 3)
        assert np.array_equal(ours, by_pillow(pixels, boxes, size))

    @each_layout
    def test_placed_boxes_equal_pillow(self, impl: Impl, planar: bool) -> None:
        """What is cut out of a resized image, and what is filled around one: `Resize` and `CenterCrop`, and `pad`."""
        sizes = [(53, 31, 17), (31, 53, 16), (1, 40, 5), (40, 1, 5), (5, 8, 9)]
        if not INTERPRETED:
            sizes += [(225, 230, 224), (375, 500, 224), (8, 1000, 96), (7, 13, 9), (33, 900, 16), (2, 2, 7)]
        for height, width, size in sizes:
            pixels, extent = picture(height, width), (np.array([height]), np.array([width]), size)
            boxes = np.concatenate((padded(*extent), center_crops(*extent, size), center_crops(*extent, size + 3)))
            packed, rows = pack(pixels, planar=planar), np.zeros(len(boxes), dtype=np.int64)
            ours = crop_resize(packed, rows, boxes, size, fill=FILL, impl=impl).numpy()
            assert np.array_equal(ours, by_pillow(pixels, boxes, size)), (height, width, size)

    @each_layout
    def test_boxes_of_one_call_do_not_touch_one_another(self, planar: bool, impl: Impl) -> None:
        packed, rows, boxes = self.many_boxes(planar=planar)
        sources = [Image.fromarray(self.images[row]) for row in rows]
        theirs = [in_single_passes(image, box, 20) for image, box in zip(sources, boxes.tolist(), strict=True)]
        together = crop_resize(packed, rows, boxes, 20, impl=impl)
        assert np.array_equal(together.numpy(), np.stack(theirs))
        for number in range(0, len(rows), 5):
            part = slice(number, number + 1)
            assert torch.equal(crop_resize(packed, rows[part], boxes[part], 20, impl=impl)[0], together[number])

    @each
    def test_no_boxes(self, impl: Impl) -> None:
        packed = pack(picture(4, 4))
        ours = crop_resize(packed, np.empty(0, dtype=np.int64), np.empty((0, 4), dtype=np.int32), 8, impl=impl)
        assert ours.shape == (0, 8, 8, 3)
        assert ours.dtype == torch.uint8

    @each_layout
    def test_an_image_far_behind_in_the_buffer(self, planar: bool, impl: Impl) -> None:
        """Offsets count in int64: a device buffer holds more than 2**31 bytes."""
        pixels, boxes, rows = picture(6, 7), random_boxes(6, 7, 4), np.zeros(4, dtype=np.int64)
        near = pack(pixels, planar=planar)
        buffer = torch.empty(2**31 + pixels.size, dtype=torch.uint8)  # never touched but at its end
        buffer[2**31 :] = near.pixels
        far = replace(near, pixels=buffer, offsets=np.array([2**31]))
        assert np.array_equal(crop_resize(far, rows, boxes, 8, impl=impl).numpy(), by_pillow(pixels, boxes, 8))

    @pytest.mark.parametrize("impl", ["auto", *IMPLS])
    @pytest.mark.parametrize(
        "box", [[0, 0, 5, 3], [0, 0, 4, 4], [-1, 0, 2, 2], [0, -1, 2, 2], [3, 0, 2, 1], [0, 2, 1, 2], [0, 0, 0, 1]]
    )
    def test_a_box_that_leaves_its_image(self, box: list[int], impl: Impl) -> None:
        """Compiled code checks no place in memory: what is outside is refused before."""
        packed = pack(picture(9, 9), picture(4, 3))
        boxes = np.array([[0, 0, 9, 9], box], dtype=np.int32)
        with pytest.raises(AssertionError):
            crop_resize(packed, np.array([0, 1]), boxes, 8, impl=impl)

    def test_an_image_that_leaves_the_buffer(self) -> None:
        packed = pack(picture(9, 9), picture(4, 3))
        boxes = full_image_boxes(packed.heights, packed.widths)
        for offsets in ([0, 244], [-1, 243]):
            with pytest.raises(AssertionError):
                crop_resize(replace(packed, offsets=np.array(offsets)), np.array([0, 1]), boxes, 8)


def test_nothing_is_read_back_from_the_device() -> None:
    """The meta device holds no values: whatever asked for one would raise."""
    packed = pack(picture(20, 30))
    on_device = replace(packed, pixels=packed.pixels.to("meta"))
    ours = crop_resize(on_device, np.zeros(5, dtype=np.int64), random_boxes(20, 30, 5), 8)
    assert ours.shape == (5, 8, 8, 3)
    assert ours.device.type == "meta"


if INTERPRETED:

    @pytest.mark.parametrize("scratch_bytes", [1, 3000])
    def test_any_scratch(scratch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        packed, rows, boxes = TestEachImplementation().many_boxes()
        expected = crop_resize(packed, rows, boxes, 9, impl="numba")
        monkeypatch.setattr("pipelines.crop_resize_triton._SCRATCH_BYTES", scratch_bytes)
        assert torch.equal(crop_resize(packed, rows, boxes, 9, impl="triton"), expected)


def arguments(count: int = 50) -> tuple[PackedImages, np.ndarray, Boxes]:
    """Boxes of images of many sizes."""
    images = [picture(20 + 13 * number, 90 - 7 * number, seed=number) for number in range(10)]
    boxes = [random_boxes(*images[number % 10].shape[:2], 3, number)[2:] for number in range(count)]
    return pack(*images), np.arange(count) % 10, squashed(np.concatenate(boxes), 24)


def test_no_byte_beyond_an_image_is_read() -> None:
    """Images that lie between two pages of memory that must not be touched: reading there ends the process."""
    code = """
import ctypes, mmap
import numpy as np, torch
from pipelines.crop_resize import crop_resize
from pipelines.packed_images import PackedImages
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 4 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for place in (0, 3 * page):
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + place), ctypes.c_size_t(page), 0) == 0
zero, num_compared = np.zeros(1, dtype=np.int64), 0
for height, width in ((40, 64), (37, 40), (1, 9), (1, 1)):
    num_bytes = 3 * height * width
    for offset in (page, 3 * page - num_bytes):
        pixels = np.frombuffer(memory, dtype=np.uint8, offset=offset, count=num_bytes)
        pixels[:] = np.random.default_rng(0).integers(0, 256, num_bytes)
        images = PackedImages.side_by_side(torch.from_numpy(pixels), zero + height, zero + width)
        boxes = np.array([[0, 0, height, width]], dtype=np.int32)
        for size in (7, 32):
            ours, plain = (crop_resize(images, zero, boxes, size, impl=impl) for impl in ("numba", "torch"))
            assert torch.equal(ours, plain)
            num_compared += 1
print(num_compared)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["16"]


class TestNumba:
    @pytest.mark.parametrize("num_threads", [2, 3, 7, 64])
    def test_any_number(self, num_threads: int) -> None:
        one, many = (crop_resize_numba(*arguments(), 24, FILL, number) for number in (1, num_threads))
        assert torch.equal(one, many)

    def test_it_is_taken_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = crop_resize(*arguments(), 24, impl="torch")
        monkeypatch.setattr(module, "_crop_resize_torch", None)
        assert torch.equal(crop_resize(*arguments(), 24), expected)


def test_scratch_is_as_large_as_is_asked_for_and_nothing_is_overrun() -> None:
    """Scratch of exactly the size that is asked for, full of garbage, and borders that show what is overrun."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 150, 2).tolist()
        size, extent = int(rng.integers(1, 80)), (np.array([height]), np.array([width]))
        box = squashed(random_boxes(height, width, 3, int(rng.integers(1 << 30)))[2:], size)
        box = (box, padded(*extent, size), center_crops(*extent, size, size + 3))[int(rng.integers(3))]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        needed = scratch_size(box, size)
        scratch = np.full(needed + 64, 0xDEADBEEF, dtype=np.uint32)
        output = np.full(size * size * 3 + 64, 77, dtype=np.uint8)
        geometry, target = box_geometry(np.array([0]), extent[1], box), output[:-64].view(np.int8)
        resize = compiled_kernel()
        resize(pixels.reshape(-1), geometry, np.array([0]), size, packed(FILL), target, scratch[:needed])
        assert (output[-64:] == 77).all()
        assert (scratch[needed:] == 0xDEADBEEF).all()
        assert np.array_equal(output[:-64].reshape(size, size, 3), by_pillow(pixels, box, size)[0])


def test_beside_ffcv() -> None:
    """FFCV's page caches make numba's one and only type of uint8 arrays read-only, before or after we compile."""
    code = """
import sys
import numpy as np, torch
from numba import types
from pipelines.crop_resize import crop_resize
from pipelines.packed_images import PackedImages
from pipelines.crop_resize_numba import compiled_kernel
zero, boxes = np.zeros(1, dtype=np.int64), np.array([[0, 0, 40, 50]], dtype=np.int32)
pixels = torch.randint(0, 256, (6000,), dtype=torch.uint8)
images = PackedImages.side_by_side(pixels, zero + 40, zero + 50)
expected = crop_resize(images, zero, boxes, 8, impl="torch")
if sys.argv[1] == "after":
    assert torch.equal(crop_resize(images, zero, boxes, 8, impl="numba"), expected)
changed = types.uint8[::1]
changed.mutable = False
assert torch.equal(crop_resize(images, zero, boxes, 8, impl="numba"), expected)
assert len(compiled_kernel().overloads) == 1
"""
    for moment in ("before", "after"):
        done = subprocess.run([sys.executable, "-c", code, moment], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.real_data
def test_evaluation_and_originals_are_torchvision_s_on_photographs(real_data: Path) -> None:
    """`Resize(256)` and `CenterCrop(224)`; and LeOCLR's original, padded, cut, and squashed."""
    split = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
    images = [decode_rgb(split, index) for index in range(0, len(split), 8)]

    def padded_by_torchvision(image: Image.Image) -> Image.Image:
        height, width = (max(1, int(224 * side / max(image.size))) for side in (image.height, image.width))
        left, top = (224 - width) // 2, (224 - height) // 2
        return TF.pad(TF.resize(image, [height, width]), [left, top, 224 - width - left, 224 - height - top], FILL)

    sizes = np.array([image.height for image in images]), np.array([image.width for image in images])
    packed, rows = pack(*map(np.asarray, images)), np.arange(len(images))
    for boxes, oracle in (
        (center_crops(*sizes, 224, 256), lambda image: TF.center_crop(TF.resize(image, 256), [224, 224])),
        (center_crops(*sizes, 224, 224), lambda image: TF.center_crop(TF.resize(image, 224), [224, 224])),
        (padded(*sizes, 224), padded_by_torchvision),
        (squashed(full_image_boxes(*sizes), 224), lambda image: TF.resize(image, [224, 224])),
    ):
        expected = np.stack([np.asarray(oracle(image)) for image in images])
        assert_close(crop_resize(packed, rows, boxes, 224, fill=FILL).numpy(), expected, RESIZE_AND_CENTER_CROP)
