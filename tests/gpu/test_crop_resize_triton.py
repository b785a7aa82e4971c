"""The Triton resize on a GPU: Pillow's bits at real sizes, the CPU's in a real batch, and no wait for the host."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from pipelines import crop_resize as module
from pipelines.config import ViewConfig
from pipelines.crop_resize import crop_resize
from pipelines.crops import Boxes
from pipelines.packed_images import PackedImages
from pipelines.views import LEOCLR_VIEWS, draw_boxes
from tests.pipelines.pictures import picture
from tests.pipelines.test_crop_resize import SIZES, by_pillow, pack, random_boxes

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


def on_gpu(images: PackedImages) -> PackedImages:
    return replace(images, pixels=images.pixels.cuda())


def photographs(count: int, *, planar: bool) -> tuple[PackedImages, np.ndarray, Boxes]:
    """Images of ImageNet's sizes, a few of them large, and LeOCLR's three boxes of each."""
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(200, 600, count), rng.integers(200, 600, count)
    heights[::16] *= 4
    widths[::16] *= 4
    pixels = torch.from_numpy(rng.integers(0, 256, int((3 * heights * widths).sum()), dtype=np.uint8))
    images = PackedImages.side_by_side(pixels, heights, widths, planar=planar)
    rows = np.arange(count)
    boxes = draw_boxes(LEOCLR_VIEWS, ViewConfig(image_size=224), heights, widths, 0, 0, rows)
    return images, np.repeat(rows, len(LEOCLR_VIEWS)), boxes[..., :4].reshape(-1, 4)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["noise", "black and white", "waves"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_equals_pillow(height: int, width: int, size: int, kind: str, planar: bool) -> None:
    pixels, boxes = picture(height, width, kind), random_boxes(height, width, 8)
    ours = crop_resize(on_gpu(pack(pixels, planar=planar)), np.zeros(8, dtype=np.int64), boxes, size, impl="triton")
    assert np.array_equal(ours.cpu().numpy(), by_pillow(pixels, boxes, size))


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("size", [32, 33, 96, 224])
def test_a_batch_of_photographs_equals_the_cpu_s(size: int, planar: bool) -> None:
    images, rows, boxes = photographs(64, planar=planar)
    expected = crop_resize(images, rows, boxes, size)
    assert torch.equal(crop_resize(on_gpu(images), rows, boxes, size, impl="triton").cpu(), expected)


def test_it_is_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows, boxes = photographs(4, planar=True)
    monkeypatch.setattr(module, "_crop_resize_torch", None)
    ours = crop_resize(on_gpu(images), rows, boxes, 64)
    assert torch.equal(ours.cpu(), crop_resize(images, rows, boxes, 64))


def test_it_does_not_wait_for_the_host() -> None:
    images, rows, boxes = photographs(8, planar=False)
    images = on_gpu(images)
    expected = crop_resize(images, rows, boxes, 96, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = crop_resize(images, rows, boxes, 96, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ours, expected)


def test_on_another_stream() -> None:
    images, rows, boxes = photographs(16, planar=True)
    expected = crop_resize(images, rows, boxes, 224)
    images = on_gpu(images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = [crop_resize(images, rows, boxes, 224, impl="triton") for _ in range(4)]
    stream.synchronize()
    assert all(torch.equal(result.cpu(), expected) for result in ours)
