"""Encoded images by index: the same bytes from folders, tars and converted data sets."""

from __future__ import annotations

import errno
import os
import resource
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.files import ByteFile
from dataset_tools.sources import Split, open_source
from pipelines.byte_readers import ExtentReader, open_bytes
from pipelines.decode import decode_rgb

KINDS = ["folder", "tar", "tars", "ffcv", "webdataset"]


@pytest.fixture
def open_kind(split: Split, tmp_path: Path) -> Callable[[str], Split]:
    """The 23 images of `split` as a folder, a tar or a converted data set, in the same order."""

    def open_as(kind: str) -> Split:
        folder = tmp_path / "images"
        if kind == "folder":
            return split
        if kind == "tar":
            with tarfile.open(tmp_path / "images.tar", "w") as archive:
                archive.add(folder, arcname="images")
            return open_source(tmp_path / "images.tar").splits["train"]
        if kind == "tars":
            (tmp_path / "tars").mkdir()
            for name in "abc":
                with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as archive:
                    archive.add(folder / name, arcname=".")
            return open_source(tmp_path / "tars").splits["train"]
        options = ConvertOptions(format=kind, order="source", shard_size="64KiB")  # type: ignore[arg-type]
        convert(folder, tmp_path / kind, options, workers=1)
        return open_source(tmp_path / kind).splits["train"]

    return open_as


@pytest.mark.parametrize("kind", KINDS)
class TestEveryReader:
    def test_bytes_in_any_order(self, kind: str, split: Split, open_kind: Callable[[str], Split]) -> None:
        reader = open_bytes(open_kind(kind))
        assert isinstance(reader, ExtentReader) == (kind != "folder")
        for indices in (np.arange(23), np.array([22, 0, 7, 7, 3]), np.array([5])):
            reader.will_need(indices)
            images = reader.read(indices)
            assert images.unreadable == {}
            assert [image.tobytes() for image in images.images] == [split.read(int(i)) for i in indices]
            assert images.raw_sizes.tolist() == [[0, 0]] * len(indices)

    def test_many_threads(self, kind: str, split: Split, open_kind: Callable[[str], Split]) -> None:
        reader = open_bytes(open_kind(kind))
        orders = [np.roll(np.arange(23), shift) for shift in range(16)]
        with ThreadPoolExecutor(8) as pool:
            for indices, images in zip(orders, pool.map(reader.read, orders), strict=True):
                assert [image.tobytes() for image in images.images] == [split.read(int(i)) for i in indices]


@pytest.mark.parametrize("kind", ["tar", "ffcv"])
def test_a_file_that_is_cut_short_names_its_samples(kind: str, open_kind: Callable[[str], Split]) -> None:
    split = open_kind(kind)
    reader = open_bytes(split)
    assert isinstance(reader, ExtentReader)
    everything = reader.read(np.arange(23))
    path = reader._files[0].path
    end_of_first = int(reader._offsets.min() + len(everything.images[0]))
    os.truncate(path, end_of_first)
    images = reader.read(np.array([3, 0]))
    assert images.images[1].tobytes() == everything.images[0].tobytes()
    assert list(images.unreadable) == [0]
    assert split.names[3] in images.unreadable[0]
    assert "cut short" in images.unreadable[0]


def test_an_image_that_is_gone_or_no_image(split: Split, damage: Callable[..., None]) -> None:
    damage(split, 2, how="missing")
    damage(split, 5)
    reader = open_bytes(split)
    indices = np.array([1, 2, 5])
    reader.will_need(indices)
    images = reader.read(indices)
    assert list(images.unreadable) == [1]
    assert "cannot read sample" in images.unreadable[1]
    assert images.images[1].size == 0
    assert images.images[2].tobytes() == b"no image"


@pytest.mark.parametrize("kind", ["folder", "ffcv"])
def test_read_ahead(kind: str, open_kind: Callable[[str], Split], monkeypatch: pytest.MonkeyPatch) -> None:
    split, hinted = open_kind(kind), []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: hinted.append(os.readlink(f"/proc/self/fd/{file}")))
    num_open = len(os.listdir("/proc/self/fd"))
    open_bytes(split.subset([4, 9])).will_need(np.array([1, 0]))
    assert hinted == (
        [str(split.root / split.names[index]) for index in (9, 4)]  # type: ignore[attr-defined]
        if kind == "folder"
        else 2 * [str(split.files[0].path)]  # type: ignore[attr-defined]
    )
    assert len(os.listdir("/proc/self/fd")) <= num_open + (kind == "ffcv")


def test_raw_pixels_come_as_they_are(tmp_path: Path) -> None:
    """FFCV's raw mode has no encoded bytes to hand out."""
    pixels = np.arange(2 * 7 * 5 * 3, dtype=np.uint8).reshape(2, 7, 5, 3)
    for index in range(2):
        (tmp_path / "in/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(tmp_path / f"in/a/{index}.png")
    convert(tmp_path / "in", tmp_path / "out", ConvertOptions(format="ffcv"), workers=1)
    reader = open_bytes(open_source(tmp_path / "out").splits["train"])
    images = reader.read(np.array([1, 0]))
    assert images.raw_sizes.tolist() == [[7, 5], [7, 5]]
    for row, index in enumerate((1, 0)):
        assert np.array_equal(images.images[row].reshape(7, 5, 3), pixels[index])


def test_more_shards_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are let go for others, and threads that read meanwhile are not cut."""
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    files = [ByteFile(tmp_path / str(number)) for number in range(40)]
    limits, before = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("dataset_tools.files._WANTED_FILES", 0)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 12, limits[1]))
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda turn: files[turn % 40].read(50, 50, "x"), range(400)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read == [bytes([turn % 40]) * 50 for turn in range(400)]
    files.clear()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_the_fault_of_the_machine_is_no_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"not looked at")
    split = open_source(tmp_path).splits["train"]

    def failing(*_: object, **__: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(split), "read", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        open_bytes(split).read(np.array([0]))
    with pytest.raises(OSError, match=os.strerror(number)):
        decode_rgb(split, 0)
