"""Decoding once, into one buffer; see test_loader.py for what the loader makes of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.sources import Split, open_source
from pipelines import resident_loader
from pipelines.decode import decode_rgb, image_size
from pipelines.resident_loader import estimate_decoded_bytes, load_resident_images
from pipelines.threads import available_cores

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_every_image_lies_at_its_place(split: Split, workers: int | None) -> None:
    resident = load_resident_images(split, CPU, workers)
    images = resident.images
    assert len(images) == 23
    assert images.pixels.dtype == torch.uint8
    end = 0
    for index in range(23):
        expected = np.asarray(decode_rgb(split, index))
        height, width = int(images.heights[index]), int(images.widths[index])
        start = int(images.offsets[index])
        assert start == end
        end = start + 3 * height * width
        assert np.array_equal(images.pixels[start:end].reshape(height, width, 3).numpy(), expected)
    assert len(images.pixels) == end
    assert resident.unreadable == {}
    assert resident.source_index.tolist() == list(range(23))


def test_threads_are_those_asked_for(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pool = resident_loader.ThreadPoolExecutor

    def record(num_threads: int) -> object:
        asked.append(num_threads)
        return pool(num_threads)

    monkeypatch.setattr(resident_loader, "ThreadPoolExecutor", record)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    assert available_cores() == 3
    for workers in (None, 0, 1, 2):
        load_resident_images(split.subset(np.arange(3)), CPU, workers)
    assert asked == [3, 1, 1, 2]


def test_loaders_share_one_copy(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_resident_images(split, CPU, 1)
    assert load_resident_images(split, CPU, 1) is first
    assert load_resident_images(split.subset(np.arange(23)), CPU, 1) is not first
    on_meta = load_resident_images(split, torch.device("meta"), 1)
    assert on_meta.images.pixels.device.type == "meta"
    assert load_resident_images(split, CPU, 1) is first


def test_the_copy_goes_with_the_split(write_split: Callable[..., Split]) -> None:
    split = write_split(4)
    copy = weakref.ref(load_resident_images(split, CPU, 1))
    gc.collect()
    assert copy() is not None
    del split
    gc.collect()
    assert copy() is None


@pytest.mark.parametrize("wrong", [(5, 5), (1000, 1), (None, None)])
def test_a_header_that_lies_harms_no_neighbour(
    wrong: tuple[int | None, int | None], split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(split: Split, index: int) -> tuple[int, int]:
        height, width = image_size(split, index)
        return (wrong[0] or width, wrong[1] or height) if index == 7 else (height, width)

    monkeypatch.setattr(resident_loader, "image_size", lie)
    resident = load_resident_images(split, CPU, 2)
    height, width = image_size(split, 7)
    assert resident.unreadable == {7: f"it is {height} x {width} pixels, not as its header says"}
    for index in (6, 8):
        start, pixels = int(resident.images.offsets[index]), np.asarray(decode_rgb(split, index))
        assert np.array_equal(resident.images.pixels[start : start + pixels.size].numpy(), pixels.reshape(-1))


class TestMemory:
    def test_too_little(self, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        num_bytes = estimate_decoded_bytes(split)
        monkeypatch.setattr(resident_loader, "_available_bytes", lambda _: int(num_bytes / 0.79))
        load_resident_images(split, CPU, 1)
        monkeypatch.setattr(resident_loader, "_available_bytes", lambda _: int(num_bytes / 0.81))
        message = (
            r"the decoded images take 0\.0 GiB, but cpu has 0\.0 GiB free and at most 80% of that may be used; choose "
            "--loader torchvision"
        )
        with pytest.raises(ValueError, match=message):
            load_resident_images(split.subset(np.arange(23)), CPU, 1)

    def test_it_is_checked_before_it_is_taken(self, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the headers alone: images of 63 TiB must not be decoded first."""
        monkeypatch.setattr(resident_loader, "image_size", lambda *_: (10**6, 10**6))
        monkeypatch.setattr(resident_loader, "decode_rgb", lambda *_: pytest.fail("it was decoded"))
        with pytest.raises(ValueError, match=r"take 64261\.3 GiB, but cpu has"):
            load_resident_images(split, CPU, 1)

    def test_the_page_cache_counts_as_available(self) -> None:
        with open("/proc/meminfo") as lines:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        available = resident_loader._available_bytes(CPU) / 1024
        assert available == pytest.approx(kib["MemAvailable"], rel=0.2)
        assert available <= kib["MemTotal"]


class TestEstimate:
    def save(self, folder: Path, *sizes: tuple[int, int]) -> Split:
        folder.mkdir()
        for index, (height, width) in enumerate(sizes):
            Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(folder / f"{index:05}.png")
        return open_source(folder).splits["train"]

    def test_few_images_are_all_looked_at(self, tmp_path: Path) -> None:
        split = self.save(tmp_path / "few", (3, 5), (10, 10), (1, 1))
        assert estimate_decoded_bytes(split) == 3 * (15 + 100 + 1)
        assert estimate_decoded_bytes(split.subset([1])) == 300

    def test_many_images_are_sampled(self, tmp_path: Path) -> None:
        split = self.save(tmp_path / "many", *((10, 10 + index) for index in range(200)))
        reads: list[int] = []
        read, split.read = split.read, lambda index: reads.append(index) or read(index)  # type: ignore
        exact = 3 * sum(10 * (10 + index) for index in range(200))
        assert estimate_decoded_bytes(split) == pytest.approx(exact, rel=0.02)
        assert len(reads) == 64
        assert {0, 199} <= set(reads)
