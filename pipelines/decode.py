"""An encoded image as RGB pixels, as torchvision's ImageFolder would load it: PIL, no EXIF rotation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from dataset_tools.sources import Split


class UnreadableImageError(Exception):
    """An image that cannot be read or decoded; its message is the reason."""


def decode_rgb(split: Split, index: int) -> Image.Image:
    """Image ``index`` of a split in RGB. Raises `UnreadableImageError` with the reason."""
    with _reasons():
        return _open(split, index).convert("RGB")


def image_size(split: Split, index: int) -> tuple[int, int]:
    """(height, width) of an image, pixels, from its header alone. Raises `UnreadableImageError`."""
    with _reasons(), _open(split, index) as image:
        return image.height, image.width


def next_index(index: int, num_images: int) -> int:
    """The image that takes the place of an unreadable one."""
    return (index + 1) % num_images


def none_readable(split: Split, unreadable: dict[int, str]) -> ValueError:
    """The error that ends a run whose images are all unreadable."""
    index, reason = min(unreadable.items())
    return ValueError(f"none of the {len(split)} images can be read; {split.names[index]}: {reason}")


def _open(split: Split, index: int) -> Image.Image:
    return Image.open(io.BytesIO(split.read(index)))


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes make PIL raise nearly anything, from OSError to a TypeError out of a TIFF's tags.
        raise UnreadableImageError(str(error) or type(error).__name__) from error
