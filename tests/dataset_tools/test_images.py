"""The one place where image files are opened: formats, limits, and what becomes of more than 8 bits."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.transform import transform
from dataset_tools.images import MAX_SCANS, UnusableImageError, decode_rgb, open_image
from tests.dataset_tools.conversion.pictures import encoded, picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def saved(pixels: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


GRAY_16 = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
PGM_16 = b"P5 16 8 65535\n" + GRAY_16.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        saved(GRAY_16, "PNG"),
        saved(GRAY_16, "TIFF"),
        saved(GRAY_16.astype(">u2"), "TIFF"),
        saved(GRAY_16, "TIFF", compression="tiff_lzw"),
        saved(GRAY_16, "JPEG2000", irreversible=False),
        PGM_16,
    ],
    ids=["png", "tiff", "big-endian tiff", "lzw tiff", "jpeg 2000", "pgm"],
)
def test_16_bits_keep_the_upper_8(data: bytes, tmp_path: Path) -> None:
    expected = np.repeat((GRAY_16 >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(np.asarray(decode_rgb(data)), expected)
    (tmp_path / "image").write_bytes(data)
    assert np.array_equal(np.asarray(decode_rgb(tmp_path / "image")), expected)


def test_12_bits_of_a_tiff_keep_the_upper_8() -> None:
    values = [0, 0x123, 0xABC, 0xFFF]
    pixels = bytes.fromhex("000123" + "abcfff")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    tiff = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(decode_rgb(tiff))[0, :, 0].tolist() == [value >> 4 for value in values]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_gray_values_without_a_white_are_refused(kind: type) -> None:
    data = saved(np.linspace(0, 1000, 128).reshape(8, 16).astype(kind), "TIFF")
    assert open_image(data).size == (16, 8)
    with pytest.raises(UnusableImageError, match="nothing says what is white"):
        decode_rgb(data)


def test_no_program_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PostScript, and Windows metafiles, are for other programs."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for data in (EPS, b"\xd7\xcd\xc6\x9a" + bytes(60), b"P7\n332 64 48\n", b"%PDF-1.4\n", b"<!DOCTYPE html>"):
        with pytest.raises(UnusableImageError, match="no image of a format that is read"):
            decode_rgb(data)
    assert not (tmp_path / "started").exists()


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encoded(picture(64, 48), "JPEG", progressive=True)
    assert decode_rgb(data).size == (64, 48)
    start = data.rfind(b"\xff\xda")
    slow = data[:start] + data[start:-2] * (MAX_SCANS + 1) + data[-2:]
    for read in (open_image, lambda data: transform(data, "a.jpg", ConvertOptions(format="webdataset"))):
        with pytest.raises(UnusableImageError, match=r"a JPEG of 1\d\d scans"):
            read(slow)


FILES = [
    PGM_16,
    *(encoded(picture(24, 16), kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "JPEG2000")),
]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(0, 2000),
)
def test_changed_bytes_are_pixels_or_an_error_that_says_why(
    data: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    reason = ""
    try:
        image = decode_rgb(bytes(damaged[: len(damaged) - cut % len(damaged)] if cut > 1000 else damaged))
    except UnusableImageError as error:
        reason = str(error)
    assert reason or np.asarray(image).shape == (image.height, image.width, 3)
