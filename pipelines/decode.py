"""An encoded image as RGB pixels, as torchvision's ImageFolder would load it; another image where it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataset_tools import images
from dataset_tools.files import raise_if_of_machine
from dataset_tools.sources import Split

_MAX_BAD_FRACTION = 0.01
ALWAYS_TOLERATED = 10


class UnreadableImageError(Exception):
    """An image that cannot be read or decoded; its message is the reason."""


def decode_rgb(split: Split, index: int) -> Image.Image:
    """Image ``index`` of a split in RGB, without EXIF rotation. Raises `UnreadableImageError` with the reason."""
    with _reasons():
        return images.decode_rgb(split.read(index))


def decode_bytes(encoded: bytes) -> Image.Image:
    """An image's bytes in RGB; otherwise as `decode_rgb`."""
    with _reasons():
        return images.decode_rgb(encoded)


def require_decodable(encoded: bytes) -> None:
    """Raises what `decode_bytes` would, of a JPEG in less time: it is decoded at an eighth of its size."""
    with _reasons(), images.open_image(encoded) as image:
        image.draft("RGB", (1, 1))  # no other format has such a thing
        images.rgb(image)


def image_size(split: Split, index: int) -> tuple[int, int]:
    """(height, width) of an image, pixels, from its header alone. Raises `UnreadableImageError`."""
    with _reasons(), images.open_image(split.read(index)) as image:
        return image.height, image.width


def max_unreadable(num_images: int) -> int:
    """How many unreadable images a run puts up with."""
    return max(ALWAYS_TOLERATED, int(_MAX_BAD_FRACTION * num_images))


def none_readable(split: Split, unreadable: dict[int, str]) -> ValueError:
    """The error that ends a run whose images are all unreadable."""
    index, reason = min(unreadable.items())
    return ValueError(f"none of the {len(split)} images can be read; {split.names[index]}: {reason}")


class Substitutes:
    """The next readable image of a split takes the place of one that cannot be read; what cannot is remembered."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self.unreadable: dict[int, str] = {}
        """Index of each image that is known to be unreadable -> the reason."""

    def find(self, index: int, passed: dict[int, str]) -> int | None:
        """The image itself, or the next one that is not known to be unreadable.

        passed: collects those in between, with their reasons. None if they become more than a run puts up with, or
        all that there are.
        """
        for _ in range(len(self._split)):
            reason = self.unreadable.get(index)
            if reason is None:
                return index
            passed[index] = reason
            if len(passed) > max_unreadable(len(self._split)):
                break
            index = (index + 1) % len(self._split)
        return None

    def replace(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images that take the places of ``indices``, int64 [B], as far as it is known now."""
        replaced = indices.copy()
        for row in np.flatnonzero(np.isin(indices, list(self.unreadable))).tolist():
            found = self.find(int(indices[row]), {})
            replaced[row] = replaced[row] if found is None else found  # None: so many that the run ends anyway
        return replaced

    def decode(self, index: int, passed: dict[int, str]) -> tuple[int, Image.Image] | None:
        """The image or the next one that can be read: its index and its pixels. passed and None: as in `find`."""
        while (found := self.find(index, passed)) is not None:
            try:
                return found, decode_rgb(self._split, found)
            except UnreadableImageError as error:
                self.unreadable[found] = str(error)
        return None


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            raise_if_of_machine(error)
        # Damaged bytes make PIL raise nearly anything, from OSError to a TypeError out of a TIFF's tags.
        raise UnreadableImageError(str(error) or type(error).__name__) from error
