"""One image on its way to disk: its bytes are passed through, it is re-encoded, or it cannot be used.

The truth is what torchvision's ImageFolder hands out: `PIL.Image.open(file).convert("RGB")`. So EXIF orientation is not
applied (and DALI must be told `adjust_orientation=False`; FFCV never does), palettes become RGB, alpha is dropped. Only
16 bits are another matter (`images.rgb`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from dataset_tools.conversion.jpeg import START, DamagedJpegError, read_jpeg_header
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.records import JPG, MAX_SIDE, PASSED_THROUGH, PNG, RAW, REENCODED
from dataset_tools.images import UnusableImageError, check_pixels, decode_rgb, load_image, rgb, unusable_unless_done

MAX_JPEG_SIDE = 65_500
"""libjpeg's limit, pixels."""
LOSSLESS_FORMATS = ("PNG", "BMP", "PPM", "TIFF")
"""Pillow's names of what stays lossless (unless its name says .jpg)."""
JPEG_EXTENSIONS = (".jpg", ".jpeg")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PLAIN_PNG = (b"\x08\x00", b"\x08\x02")
"""The bytes of a PNG's header that say 8 bits, gray or RGB."""


@dataclass(frozen=True, slots=True)
class StoredImage:
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


def transform(data: bytes, name: str, options: ConvertOptions) -> StoredImage:
    """Makes of the image file `data`, called `name`, what `options` ask for. Raises UnusableImageError."""
    if not data:
        raise UnusableImageError("it is empty")
    if data[:2] == START:
        return _transform_jpeg(data, options)
    is_named_jpeg = name.lower().endswith(JPEG_EXTENSIONS)
    if options.mode != "reencode" and not is_named_jpeg and (passed := _pass_png(data, options)):
        return passed
    image = load_image(data)
    file_format = image.format or "?"
    lossless = file_format in LOSSLESS_FORMATS and not is_named_jpeg
    if options.mode == "passthrough" and not (lossless and options.output.lossless == RAW):
        raise UnusableImageError(f"it is {file_format} and would have to be re-encoded; --mode passthrough does not")
    if not lossless or options.mode == "reencode":
        return _reencode(image, options, f"{file_format}, not JPEG")
    image, encoding = _fitted(image, options), options.output.lossless
    stored = image.tobytes() if encoding == RAW else _encoded(image, "PNG")
    return StoredImage(stored, image.width, image.height, encoding, REENCODED, f"{file_format}, kept lossless")


def decode(data: bytes, encoding: int, width: int, height: int) -> Image.Image:
    """A stored image, as RGB. Raises UnusableImageError if it cannot be decoded or is of another size."""
    if encoding == RAW:
        if len(data) != 3 * width * height:
            raise UnusableImageError(f"{len(data)} bytes are no {width} x {height} raw pixels")
        return Image.frombytes("RGB", (width, height), data)
    image = decode_rgb(data)
    if image.size != (width, height):
        raise UnusableImageError(f"it is {image.width} x {image.height} pixels, and not {width} x {height}")
    return image


def _transform_jpeg(data: bytes, options: ConvertOptions) -> StoredImage:
    try:
        header = read_jpeg_header(data)
    except DamagedJpegError as damage:
        # What libjpeg puts up with (padding between markers, say) is mended; what it does not is the user's to see.
        return _reencode_unless_forbidden(data, options, "irregular markers", str(damage))
    width, height = header.width, header.height
    check_pixels(width, height)
    reason = header.obstacle
    if not reason and options.target_size(width, height) != (width, height):
        reason = "larger than the limit"
    if not reason and options.max_jpeg_bytes and len(data) > options.max_jpeg_bytes:
        reason = "more bytes than a page"
    if not reason and options.mode == "reencode":
        reason = "asked for"
    if reason:
        return _reencode_unless_forbidden(data, options, reason, reason)
    return _passed_through(data, width, height, JPG, options)


def _pass_png(data: bytes, options: ConvertOptions) -> StoredImage | None:
    """A PNG of 8 bits, gray or RGB, that needs no change where PNGs are stored; None for anything else."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if options.output.lossless != PNG or data[:8] != _PNG_START or data[12:16] != b"IHDR" or not width * height:
        return None
    if data[24:26] not in _PLAIN_PNG or b"tRNS" in data or b"IEND" not in data[-64:]:
        return None
    if options.target_size(width, height) != (width, height):
        return None
    check_pixels(width, height)
    _check_sides(width, height)
    return _passed_through(data, width, height, PNG, options)


def _passed_through(data: bytes, width: int, height: int, encoding: int, options: ConvertOptions) -> StoredImage:
    if options.check == "decode":
        decode(data, encoding, width, height)
    return StoredImage(data, width, height, encoding, PASSED_THROUGH, "")


def _reencode_unless_forbidden(data: bytes, options: ConvertOptions, reason: str, details: str) -> StoredImage:
    image = load_image(data)
    if options.mode == "passthrough":
        raise UnusableImageError(f"it would have to be re-encoded ({details}); --mode passthrough does not")
    return _reencode(image, options, reason)


def _reencode(image: Image.Image, options: ConvertOptions, reason: str) -> StoredImage:
    image = _fitted(image, options)
    if max(image.size) > MAX_JPEG_SIDE:
        raise UnusableImageError(f"a side of {max(image.size):,} pixels is more than libjpeg's {MAX_JPEG_SIDE:,}")
    encoded = _encoded(image, "JPEG", quality=options.quality)
    return StoredImage(encoded, image.width, image.height, JPG, REENCODED, reason)


def _encoded(image: Image.Image, file_format: str, **given: int) -> bytes:
    encoded = io.BytesIO()
    with unusable_unless_done("it cannot be encoded: "):
        image.save(encoded, file_format, **given)
    return encoded.getvalue()


def _fitted(image: Image.Image, options: ConvertOptions) -> Image.Image:
    """Converts an image to RGB, within the limits (Lanczos), without the metadata of the file."""
    image = rgb(image)
    with unusable_unless_done():
        size = options.target_size(image.width, image.height)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
    image.info = {}
    _check_sides(*image.size)
    return image


def _check_sides(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise UnusableImageError(f"a side of {max(width, height):,} pixels is more than can be stored, {MAX_SIDE:,}")
