"""What the tests of the data layer share: image folders, a log that the command line cannot take away, real data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from dataset_tools.sources import Split, open_source
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


@pytest.fixture
def damage(tmp_path: Path) -> Callable[..., None]:
    """Damages images of a split in place."""

    def spoil(split: Split, *indices: int, how: str = "text") -> None:
        for index in indices:
            path = split.root / split.names[index]  # type: ignore[attr-defined]
            data = path.read_bytes()
            if how == "missing":
                path.unlink()
            else:
                path.write_bytes({"text": b"no image", "empty": b"", "cut short": data[: len(data) // 2]}[how])

    return spoil


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """caplog for the package's loggers, also where the command line has given them handlers of their own."""
    logger = logging.getLogger("pipelines")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [caplog.handler], False
    logger.setLevel(logging.INFO)
    yield caplog
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
