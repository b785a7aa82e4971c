"""Small images with known pixels, in every encoding, whole and damaged."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.conversion.transform import StoredImage, decode


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Smooth, not symmetric, and of another colour in each corner."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) * 255 // max(width + height - 2, 1)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).convert(mode)


def flat(color: tuple[int, int, int], width: int = 24, height: int = 20) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def truth(data: bytes) -> np.ndarray:
    """What torchvision's ImageFolder hands out, uint8 [H, W, 3]; of 16 bits the upper 8, where that hands out white."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def pixels(image: StoredImage) -> np.ndarray:
    """Of what would lie on disk: uint8 [H, W, 3]."""
    return np.asarray(decode(image.data, image.encoding, image.width, image.height))


def with_frame(jpeg: bytes, *, marker: int = 0xC0, precision: int = 8, size: tuple[int, int] | None = None) -> bytes:
    """A baseline JPEG whose start of frame says something else; `size` is (width, height)."""
    at = jpeg.index(b"\xff\xc0")
    height, width = (size[1], size[0]) if size else struct.unpack_from(">HH", jpeg, at + 5)
    frame = b"\xff" + bytes([marker]) + jpeg[at + 2 : at + 4] + bytes([precision]) + struct.pack(">HH", height, width)
    return jpeg[:at] + frame + jpeg[at + 9 :]


def with_adobe_transform(jpeg: bytes, transform: int) -> bytes:
    """A JPEG with an Adobe marker, of another colour transform: 0 none, 1 YCbCr, 2 YCCK."""
    at = jpeg.index(b"Adobe") + 11
    return jpeg[:at] + bytes([transform]) + jpeg[at + 1 :]


def before_tables(jpeg: bytes, inserted: bytes) -> bytes:
    """A JPEG with bytes inserted between two markers: before the first quantization table."""
    at = jpeg.index(b"\xff\xdb")
    return jpeg[:at] + inserted + jpeg[at:]


def rotated_by_exif(image: Image.Image, **options: Any) -> bytes:
    """A JPEG that says: turn me by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif, **options)


def black_png(width: int, height: int, *, with_pixels: bool = True) -> bytes:
    """Of any size, made in little memory; without pixels it is a header and nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    if with_pixels:
        compress = zlib.compressobj(1)
        rows = b"".join([compress.compress(bytes(3 * width + 1)) for _ in range(height)]) + compress.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GOOD_JPEG = encoded(picture(), quality=90)
PASSED_JPEGS = {
    "baseline": GOOD_JPEG,
    "progressive": encoded(picture(), progressive=True),
    "extended sequential": with_frame(GOOD_JPEG, marker=0xC1),
    "gray": encoded(picture(mode="L")),
    "4:4:4": encoded(picture(), subsampling=0),
    "restart markers": encoded(picture(100, 100), restart_marker_rows=1),
    "EXIF orientation": rotated_by_exif(picture()),
    "ICC profile": encoded(picture(), icc_profile=bytes(70_000)),
    "one pixel": encoded(picture(1, 1)),
    "odd sides": encoded(picture(43, 31)),
    "bytes behind the end": GOOD_JPEG + b"camera maker's own" * 3,
    "fill bytes": before_tables(GOOD_JPEG, b"\xff\xff\xff"),
    "comment": encoded(picture(), comment="\xff\xd9 is the end of an image".encode("latin-1")),
    "MPO": encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 20)]),
}
"""What every decoder reads alike, so that the bytes need no change."""
