"""The resize that numba compiles, beside what test_crop_resize.py asks of both: memory, threads, choice, FFCV."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import crop_resize as module
from pipelines import crop_resize_numba as compiled
from pipelines.crop_resize import PackedImages, crop_resize
from pipelines.crop_resize_numba import crop_resize_numba
from pipelines.crops import Boxes, full_image_boxes
from tests.pipelines.pictures import picture
from tests.pipelines.test_crop_resize import in_single_passes, pack, random_boxes


def arguments(count: int = 50, *, planar: bool = False) -> tuple[PackedImages, np.ndarray, Boxes]:
    """Boxes of images of many sizes."""
    images = [picture(20 + 13 * number, 90 - 7 * number, seed=number) for number in range(10)]
    boxes = [random_boxes(*images[number % 10].shape[:2], 3, number)[2:] for number in range(count)]
    return pack(*images, planar=planar), np.arange(count) % 10, np.concatenate(boxes)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("height", "width", "size"), [(900, 1300, 8), (700, 40, 1), (40, 2500, 3)])
def test_sums_over_many_pixels_are_exact(height: int, width: int, size: int, planar: bool) -> None:
    """Up to 2500 source pixels for one, where float32 would no longer be enough."""
    pixels = picture(height, width, seed=width)
    boxes = np.concatenate((random_boxes(height, width, 6, seed=1), [[0, 0, height, width]])).astype(np.int32)
    ours = crop_resize(pack(pixels, planar=planar), np.zeros(7, dtype=np.int64), boxes, size, impl="numba").numpy()
    image = Image.fromarray(pixels)
    assert np.array_equal(ours, np.stack([in_single_passes(image, box, size) for box in boxes.tolist()]))


def test_no_byte_beyond_an_image_is_read() -> None:
    """Images that lie between two pages of memory that must not be touched: reading there ends the process."""
    code = """
import ctypes, mmap
import numpy as np, torch
from pipelines.crop_resize import crop_resize
from pipelines.crop_resize import PackedImages
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 4 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for place in (0, 3 * page):
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + place), ctypes.c_size_t(page), 0) == 0
zero, num_compared = np.zeros(1, dtype=np.int64), 0
for planar in (False, True):
    for height, width in ((40, 64), (37, 40), (1, 9), (1, 1)):
        num_bytes = 3 * height * width
        for offset in (page, 3 * page - num_bytes):
            pixels = np.frombuffer(memory, dtype=np.uint8, offset=offset, count=num_bytes)
            pixels[:] = np.random.default_rng(0).integers(0, 256, num_bytes)
            images = PackedImages(
                pixels=torch.from_numpy(pixels), offsets=zero, heights=zero + height, widths=zero + width, planar=planar
            )
            boxes = np.array([[0, 0, height, width]], dtype=np.int32)
            for size in (7, 32):
                ours, plain = (crop_resize(images, zero, boxes, size, impl=impl) for impl in ("numba", "torch"))
                assert torch.equal(ours, plain)
                num_compared += 1
print(num_compared)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["32"]


class TestThreads:
    @pytest.mark.parametrize("num_threads", [2, 3, 7, 64])
    def test_any_number(self, num_threads: int) -> None:
        one, many = (crop_resize_numba(*arguments(), 24, number) for number in (1, num_threads))
        assert torch.equal(one, many)

    def test_many_callers_at_once(self) -> None:
        given = arguments()
        expected = crop_resize_numba(*given, 24, 1)
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: crop_resize_numba(*given, 24, 2), range(16))
        assert all(torch.equal(result, expected) for result in results)

    def test_in_a_forked_process(self) -> None:
        """The threads that the parent has are not there."""
        expected = crop_resize_numba(*arguments(), 24, 2)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def in_child() -> None:
            sender.send(crop_resize_numba(*arguments(), 24, 2).numpy())

        child = context.Process(target=in_child)
        child.start()
        assert receiver.poll(60)
        assert np.array_equal(receiver.recv(), expected.numpy())
        child.join()

    def test_as_many_as_torch_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(compiled, "crop_resize_numba", lambda *given: seen.append(given[-1]))
        before = torch.get_num_threads()
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                crop_resize(*arguments(), 24)
        finally:
            torch.set_num_threads(before)
        assert seen == [1, 3]


class TestChoice:
    def test_a_cpu_s_pixels_are_numba_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for planar in (False, True):
            given = arguments(planar=planar)
            expected = crop_resize(*given, 24, impl="torch")
            with monkeypatch.context() as patch:
                patch.setattr(module, "_crop_resize_torch", None)
                assert torch.equal(crop_resize(*given, 24), expected)

    def test_it_knows_only_the_cpu(self) -> None:
        images, rows, boxes = arguments()
        on_meta = replace(images, pixels=images.pixels.to("meta"))
        with pytest.raises(ValueError, match=r"numba cannot resize here, since the images are on meta, .* impl auto"):
            crop_resize(on_meta, rows, boxes, 24, impl="numba")

    def test_a_buffer_with_gaps_is_torch_s(self) -> None:
        images, rows, boxes = arguments()
        spread = replace(images, pixels=images.pixels.repeat_interleave(2)[::2])
        assert torch.equal(crop_resize(spread, rows, boxes, 24), crop_resize(images, rows, boxes, 24))
        with pytest.raises(ValueError, match=r"one row of uint8 without gaps, and this is torch.uint8 .* \[2\]"):
            crop_resize(spread, rows, boxes, 24, impl="numba")

    def test_a_numba_that_does_not_work(
        self, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
    ) -> None:
        def broken() -> None:
            raise ImportError("Numba needs NumPy 2.0 or less")

        expected = crop_resize(*arguments(), 24, impl="numba")
        monkeypatch.setattr(compiled, "compiled_kernel", broken)
        module._what_is_wrong_with_numba.cache_clear()
        try:
            for _ in range(2):
                assert torch.equal(crop_resize(*arguments(), 24), expected)
            with pytest.raises(ValueError, match=r"does not work on this machine: .*NumPy 2.0 or less"):
                crop_resize(*arguments(), 24, impl="numba")
        finally:
            module._what_is_wrong_with_numba.cache_clear()
        (record,) = package_log.records
        assert record.levelname == "WARNING"
        assert "views are resized by torch, many times slower" in record.getMessage()

    def test_numba_is_imported_when_it_is_needed(self) -> None:
        code = (
            "import sys; import numpy as np, torch; from pipelines.crop_resize import crop_resize\n"
            "from pipelines.crop_resize import PackedImages\n"
            "zero, box = np.zeros(1, dtype=np.int64), np.array([[0, 0, 4, 5]], dtype=np.int32)\n"
            "pixels = torch.zeros(60, dtype=torch.uint8)\n"
            "images = PackedImages(pixels=pixels, offsets=zero, heights=zero + 4, widths=zero + 5)\n"
            "crop_resize(images, zero, box, 8, impl='torch'); assert 'numba' not in sys.modules\n"
            "crop_resize(images, zero, box, 8); assert 'numba' in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_beside_ffcv() -> None:
    """FFCV's page caches make numba's one and only type of uint8 arrays read-only, before or after we compile."""
    code = """
import sys
import numpy as np, torch
from numba import types
from pipelines.crop_resize import crop_resize
from pipelines.crop_resize import PackedImages
from pipelines.crop_resize_numba import compiled_kernel
zero, boxes = np.zeros(1, dtype=np.int64), np.array([[0, 0, 40, 50]], dtype=np.int32)
pixels = torch.randint(0, 256, (6000,), dtype=torch.uint8)
images = PackedImages(pixels=pixels, offsets=zero, heights=zero + 40, widths=zero + 50)
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


def test_single_pixels_among_whole_images() -> None:
    """Scratch is as large as the largest box wants it, whichever box comes first."""
    images = [picture(64, 48, seed=seed) for seed in range(6)]
    packed = pack(*images)
    boxes = full_image_boxes(packed.heights, packed.widths)
    boxes[::2] = [5, 7, 1, 1]
    ours = crop_resize(packed, np.arange(6), boxes, 16, impl="numba").numpy()
    sources = [Image.fromarray(image) for image in images]
    expected = [in_single_passes(image, box, 16) for image, box in zip(sources, boxes.tolist(), strict=True)]
    assert np.array_equal(ours, np.stack(expected))
