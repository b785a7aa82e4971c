"""What the tests of the data layer share: image folders, a log that the command line cannot take away, real data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.converted import ConvertedSplit
from pipelines.byte_readers import base_of
from pipelines.loader import Loader
from pipelines.nvjpeg_loader import NvjpegLoader
from tests.pipelines.oracle import open_by_name
from tests.pipelines.pictures import picture

NUM_IMAGES = 23


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., Split]:
    """Writes JPEGs of three classes and of many sizes, and opens them as one split."""

    def write(num_images: int = NUM_IMAGES, *, name: str = "images") -> Split:
        for index in range(num_images):
            folder = tmp_path / name / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            height, width = 20 + (7 * index) % 31, 18 + (11 * index) % 37
            kind = "waves" if index % 2 else "noise"
            Image.fromarray(picture(height, width, kind, index)).save(folder / f"{index:03}.jpg", quality=90)
        return open_source(tmp_path / name).splits["train"]

    return write


@pytest.fixture
def split(write_split: Callable[..., Split]) -> Split:
    """23 images: 0 to 7 are of class 0, 8 to 15 of class 1, 16 to 22 of class 2."""
    return write_split()


def overwrite(split: ConvertedSplit, index: int, data: bytes, at: int = 0) -> None:
    """Damages a converted image behind the back of its manifest; hashes are not looked at when loading."""
    assert at + len(data) <= split.records["num_bytes"][index]
    with open(split.files[0].path, "r+b") as file:
        file.seek(int(split.records["offset"][index]) + at)
        file.write(data)


@pytest.fixture
def damage(tmp_path: Path) -> Callable[..., None]:
    """Damages images of a split in place."""

    def spoil(split: Split, *indices: int, how: str = "text") -> None:
        for index in indices:
            if isinstance(split, ConvertedSplit):
                overwrite(split, index, b"no image")
                continue
            path = split.root / split.names[index]  # type: ignore[attr-defined]
            data = path.read_bytes()
            if how == "missing":
                path.unlink()
            else:
                path.write_bytes({"text": b"no image", "empty": b"", "cut short": data[: len(data) // 2]}[how])

    return spoil


@pytest.fixture
def as_beton(tmp_path: Path) -> Callable[[Split], Split]:
    """Converts an image folder for FFCV: the same images in the same order, their JPEG bytes unchanged."""

    def convert_split(split: Split) -> Split:
        if isinstance(base_of(split)[0], ConvertedSplit):
            return split
        options = ConvertOptions(format="ffcv", order="source", max_side=0)
        convert(split.root, tmp_path / "beton", options, workers=1)  # type: ignore[attr-defined]
        return open_source(tmp_path / "beton").splits["train"]

    return convert_split


@pytest.fixture
def open_loader(as_beton: Callable[[Split], Split], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loader]]:
    """Opens loaders by name and closes them when the test ends. FFCV's reads the same images, converted; nvJPEG's has a
    CPU decoder in place of the GPU's.
    """
    monkeypatch.setattr(NvjpegLoader, "devices", ("cpu", "cuda"))
    with ExitStack() as stack:

        def start(split: Split, name: str = "resident", *given: Any, workers: int = 1, **options: Any) -> Loader:
            if name == "ffcv":
                split = as_beton(split)
            return stack.enter_context(open_by_name(name, split, *given, workers=workers, **options))

        yield start
