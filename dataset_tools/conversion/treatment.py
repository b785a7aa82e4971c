"""What one image needs: its bytes passed through, a new encoding, or a place in quarantine.

The truth is what torchvision's ImageFolder hands out: `PIL.Image.open(file).convert("RGB")`. So EXIF orientation is not
applied (and DALI must be told `adjust_orientation=False`; FFCV never does), palettes and 16 bits become RGB as Pillow
does it, alpha is dropped.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dataset_tools.conversion.jpeg import START, DamagedJpegError, read_jpeg_header
from dataset_tools.formats.beton import MAX_SIDE
from dataset_tools.formats.records import JPG, PASSED_THROUGH, PNG, RAW, REENCODED

MAX_PIXELS = 178_956_970
"""More are taken for a decompression bomb: Pillow's own limit, at which torchvision's ImageFolder fails, too."""
MAX_JPEG_SIDE = 65_500
"""libjpeg's limit, pixels."""
LOSSLESS_FORMATS = ("PNG", "BMP", "PPM", "TIFF")
"""Pillow's names of what stays lossless (unless its name says .jpg)."""
JPEG_EXTENSIONS = (".jpg", ".jpeg")
_PNG_START = b"\x89PNG\r\n\x1a\n"


class UnusableImageError(Exception):
    """The image goes to quarantine; the message says why."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done with images. Sides in pixels."""

    format: str
    """ffcv or webdataset."""
    mode: str
    """auto, passthrough or reencode."""
    check: str
    """header or decode."""
    short_side: int | None
    max_side: int | None
    quality: int
    max_jpeg_bytes: int | None
    """A JPEG of more bytes is encoded anew; None: any number."""

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the limits, with the same ratio; never larger."""
        if self.short_side and min(width, height) > self.short_side:
            width, height = _scaled(width, height, self.short_side, min(width, height))
        if self.max_side and max(width, height) > self.max_side:
            width, height = _scaled(width, height, self.max_side, max(width, height))
        return width, height


@dataclass(frozen=True, slots=True)
class Treated:
    """An image as it will lie on disk."""

    data: bytes
    width: int
    height: int
    encoding: int
    """JPG, RAW or PNG of formats.records."""
    handling: int
    """PASSED_THROUGH or REENCODED."""
    reason: str
    """Why it was re-encoded; "" if it was not."""


def treat(data: bytes, name: str, policy: Policy) -> Treated:
    """Raises UnusableImageError."""
    if not data:
        raise UnusableImageError("it is empty")
    if data[:2] == START:
        return _treat_jpeg(data, policy)
    if data[: len(_PNG_START)] == _PNG_START and (passed := _pass_png(data, name, policy)):
        return passed
    image = _decode(data)
    file_format = image.format or "?"
    lossless = file_format in LOSSLESS_FORMATS and os.path.splitext(name)[1].lower() not in JPEG_EXTENSIONS
    if policy.mode == "passthrough" and not (lossless and policy.format == "ffcv"):
        raise UnusableImageError(f"it is {file_format} and would have to be re-encoded; --mode passthrough does not")
    if lossless and policy.mode != "reencode":
        return _store_lossless(image, policy, f"{file_format}, kept lossless")
    return _reencode(image, policy, f"{file_format}, not JPEG")


def decode(data: bytes, encoding: int, width: int, height: int) -> Image.Image:
    """A stored image, as RGB. Raises UnusableImageError if it cannot be decoded or is of another size."""
    if encoding == RAW:
        if len(data) != 3 * width * height:
            raise UnusableImageError(f"{len(data)} bytes are no {width} x {height} raw pixels")
        return Image.frombytes("RGB", (width, height), data)
    image = _decode(data)
    if image.size != (width, height):
        raise UnusableImageError(f"it is {image.width} x {image.height} pixels, and not {width} x {height}")
    return image.convert("RGB")


def _treat_jpeg(data: bytes, policy: Policy) -> Treated:
    try:
        header = read_jpeg_header(data)
    except DamagedJpegError as damage:
        # What libjpeg puts up with (padding between markers, say) is mended; what it does not is the user's to see.
        return _reencode_unless_forbidden(data, policy, "irregular markers", str(damage))
    _check_pixels(header.width, header.height)
    reason = header.obstacle
    if not reason and policy.target_size(header.width, header.height) != (header.width, header.height):
        reason = "larger than the limit"
    if not reason and policy.format == "ffcv" and max(header.width, header.height) > MAX_SIDE:
        reason = f"a side of more than {MAX_SIDE} pixels"
    if not reason and policy.max_jpeg_bytes and len(data) > policy.max_jpeg_bytes:
        reason = "more bytes than a page"
    if not reason and policy.mode == "reencode":
        reason = "asked for"
    if reason:
        return _reencode_unless_forbidden(data, policy, reason, reason)
    if policy.check == "decode":
        decode(data, JPG, header.width, header.height)
    return Treated(data, header.width, header.height, JPG, PASSED_THROUGH, "")


def _reencode_unless_forbidden(data: bytes, policy: Policy, reason: str, details: str) -> Treated:
    image = _decode(data)
    if policy.mode == "passthrough":
        raise UnusableImageError(f"it would have to be re-encoded ({details}); --mode passthrough does not")
    return _reencode(image, policy, reason)


def _pass_png(data: bytes, name: str, policy: Policy) -> Treated | None:
    """A PNG of 8 bits, gray or RGB, that needs no change; None for any other."""
    if policy.format != "webdataset" or policy.mode == "reencode" or name.lower().endswith(JPEG_EXTENSIONS):
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[12:16] != b"IHDR" or data[24:26] not in (b"\x08\x00", b"\x08\x02"):
        return None
    if not width or not height:
        return None
    if b"tRNS" in data or b"IEND" not in data[-64:] or policy.target_size(width, height) != (width, height):
        return None
    _check_pixels(width, height)
    if policy.check == "decode":
        decode(data, PNG, width, height)
    return Treated(data, width, height, PNG, PASSED_THROUGH, "")


def _store_lossless(image: Image.Image, policy: Policy, reason: str) -> Treated:
    image = _fitted(image, policy)
    if policy.format == "ffcv":
        return Treated(image.tobytes(), image.width, image.height, RAW, REENCODED, reason)
    return Treated(_encoded(image, "PNG"), image.width, image.height, PNG, REENCODED, reason)


def _reencode(image: Image.Image, policy: Policy, reason: str) -> Treated:
    image = _fitted(image, policy)
    if max(image.size) > MAX_JPEG_SIDE:
        raise UnusableImageError(f"a side of {max(image.size):,} pixels is more than libjpeg's {MAX_JPEG_SIDE:,}")
    encoded = _encoded(image, "JPEG", quality=policy.quality)
    return Treated(encoded, image.width, image.height, JPG, REENCODED, reason)


def _encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    encoded = io.BytesIO()
    try:
        image.save(encoded, file_format, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise UnusableImageError(f"it cannot be encoded: {_because(error)}") from error
    return encoded.getvalue()


def _fitted(image: Image.Image, policy: Policy) -> Image.Image:
    """In RGB, within the limits (Lanczos), without the metadata of the file."""
    try:
        if image.mode != "RGB":
            image = image.convert("RGB")
        size = policy.target_size(image.width, image.height)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
    except MemoryError:
        raise
    except Exception as error:
        raise UnusableImageError(_because(error)) from error
    image.info = {}
    if policy.format == "ffcv" and max(image.size) > MAX_SIDE:
        raise UnusableImageError(f"a side of {max(image.size):,} pixels is more than FFCV's {MAX_SIDE:,}")
    return image


def _decode(data: bytes) -> Image.Image:
    """The decoded image, as Pillow loads it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            image = Image.open(io.BytesIO(data))
        _check_pixels(image.width, image.height)
        image.load()
    except (UnusableImageError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise UnusableImageError(_because(error)) from error
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"{width:,} x {height:,} pixels are taken for a decompression bomb")


def _because(error: Exception) -> str:
    """The reason, the same in every run: Pillow's own message names an address."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image that Pillow knows"
    return str(error) or type(error).__name__


def _scaled(width: int, height: int, target: int, side: int) -> tuple[int, int]:
    return max(1, round(width * target / side)), max(1, round(height * target / side))
