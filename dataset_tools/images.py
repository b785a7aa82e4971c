"""Image files: the one place where they are opened, as formats that we mean, within limits, in 8 bits by a stated rule.

Left to itself, Pillow opens whatever a file turns out to be: it hands PostScript to Ghostscript, a program. It also
clips 16 bits at 255 (`convert("RGB")`), so that nearly every pixel becomes white.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, features

from dataset_tools.conversion.jpeg import MAX_SCANS, SCAN, START
from dataset_tools.files import read_file

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
"""Pillow's names of what is opened (and AVIF, where this Pillow has it), whatever a file is called."""
MAX_PIXELS = 178_956_970
"""An image of more is taken for a decompression bomb: Pillow's own limit, at which ImageFolder fails, too."""
_OPENED = (*FORMATS, *(["AVIF"] if features.check("avif") else []))
_BITS_PER_SAMPLE = 258
"""The tag of a TIFF."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # the limits are ours; what cannot be decoded is an error


class UnusableImageError(ValueError):
    """The bytes are no image that can be used; the message says why."""


def open_image(source: bytes | os.PathLike[str]) -> Image.Image:
    """The image in some bytes, or in a regular file; only its header is read yet. Raises UnusableImageError, OSError
    for a file that cannot be read.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    with unusable_unless_done():
        image = Image.open(io.BytesIO(data), formats=_OPENED)  # noqa: TID251 (here)
        check_pixels(image.width, image.height)
        if data[:2] == START:
            first = data.find(SCAN)  # libjpeg decodes one scan alone if all components are in it
            may_have_many = "progressive" in image.info or data[first + 4] < getattr(image, "layers", 4)
            if may_have_many and (scans := data.count(SCAN)) > MAX_SCANS:
                raise UnusableImageError(f"it is a JPEG of {scans:,} scans, which would take minutes to decode")
    return image


def load_image(data: bytes) -> Image.Image:
    """The decoded image, in whatever mode it is stored. Raises UnusableImageError."""
    image = open_image(data)
    with unusable_unless_done():
        image.load()
    return image


def decode_rgb(source: bytes | os.PathLike[str]) -> Image.Image:
    """The pixels of an image as 8-bit RGB, without EXIF rotation. Raises as `open_image` does."""
    return rgb(open_image(source))


def rgb(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB: alpha is dropped, palettes are looked up, 16 bits keep the upper 8.

    The upper 8 of 16 bits are what Pillow itself keeps of 16-bit colour. Raises UnusableImageError for damage, and for
    gray values of 32 bits or floating point, whose white no format states.
    """
    with unusable_unless_done():
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            bits = 12 if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,) else 16
            return Image.fromarray((np.asarray(image) >> bits - 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
            raise UnusableImageError(f"its gray values are {kind}, and nothing says what is white: make them 8 bits")
        return image.convert("RGB")


@contextmanager
def unusable_unless_done(what: str = "") -> Iterator[None]:
    """Turns nearly anything, which Pillow raises for damage, into an UnusableImageError that begins with `what`."""
    try:
        yield
    except (UnusableImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:  # Pillow's own message names an address, another one in every run
        raise UnusableImageError(f"{what}it is no image of a format that is read ({', '.join(_OPENED)})") from error
    except Exception as error:
        raise UnusableImageError(f"{what}{str(error) or type(error).__name__}") from error


def check_pixels(width: int, height: int) -> None:
    """Raises UnusableImageError for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"{width:,} x {height:,} pixels are taken for a decompression bomb")
