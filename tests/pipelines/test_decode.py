"""Pixels as torchvision's ImageFolder loads them, and a reason for whatever cannot be read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import default_loader

from dataset_tools import images
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import Split, open_source
from pipelines.decode import (
    Substitutes,
    UnreadableImageError,
    decode_bytes,
    decode_rgb,
    image_size,
    require_decodable,
)
from tests.pipelines.pictures import encode, picture

PIXELS = picture(21, 34, "waves")


def save(path: Path, mode: str = "RGB", **options: object) -> None:
    image = Image.fromarray(PIXELS)
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    elif mode == "LA":
        image = image.convert("L")
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    else:
        image = image.convert(mode)
    image.save(path, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


IMAGES: dict[str, tuple[str, dict[str, object]]] = {
    "colour.jpg": ("RGB", {}),
    "progressive.jpeg": ("RGB", {"progressive": True}),
    "gray.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "on its side.jpg": ("RGB", {"exif": exif(6)}),
    "mirrored.jpg": ("RGB", {"exif": exif(2)}),
    "colour.png": ("RGB", {}),
    "gray.png": ("L", {}),
    "palette.png": ("P", {}),
    "transparent palette.png": ("P", {"transparency": 3}),
    "alpha.png": ("RGBA", {}),
    "gray with alpha.png": ("LA", {}),
    "black and white.png": ("1", {}),
    "16 bits.png": ("I;16", {}),
    "colour.bmp": ("RGB", {}),
    "colour.ppm": ("RGB", {}),
    "gray.pgm": ("L", {}),
    "colour.tif": ("RGB", {"compression": "tiff_lzw"}),
    "on its side.tiff": ("RGB", {"exif": exif(6)}),
    "colour.webp": ("RGB", {"lossless": True}),
    "alpha.webp": ("RGBA", {}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_equals_torchvision(name: str, tmp_path: Path) -> None:
    mode, options = IMAGES[name]
    path = tmp_path / "class" / name
    path.parent.mkdir()
    save(path, mode, **options)
    split = open_source(tmp_path).splits["train"]
    ours, theirs = decode_rgb(split, 0), default_loader(str(path))
    assert ours.mode == "RGB"
    truth = np.repeat(PIXELS[..., :1], 3, axis=2) if mode == "I;16" else np.asarray(theirs)  # torchvision clips it
    assert np.array_equal(np.asarray(ours), truth)
    assert image_size(split, 0) == (theirs.height, theirs.width)


class MemorySplit(Split):
    """Images that are nothing but their bytes."""

    def __init__(self, *images: bytes) -> None:
        self.images = images
        self.name, self.classes = "train", ()
        self.labels = np.full(len(images), -1)
        self.names = PackedNames(f"image {index}" for index in range(len(images)))

    def read(self, index: int) -> bytes:
        return self.images[index]


JPEG, PNG = (encode(Image.fromarray(PIXELS), kind) for kind in ("JPEG", "PNG"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image of a format that is read"),
        (b"no image at all", "no image of a format that is read"),
        (JPEG[:20], "no image of a format that is read|Truncated"),
        (JPEG[:-100], "truncated"),
        (PNG[:200], "truncated|broken"),
        (b"\xff\xd8" + bytes(500), "."),
    ],
)
def test_damaged_images(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as raised:
        decode_rgb(MemorySplit(data), 0)
    assert str(raised.value)
    with pytest.raises(UnreadableImageError, match=reason):
        require_decodable(data)


@pytest.mark.parametrize("data", [JPEG, encode(Image.fromarray(PIXELS), "JPEG", progressive=True), PNG])
def test_what_can_be_decoded(data: bytes) -> None:
    require_decodable(data)
    assert decode_bytes(data).size == (34, 21)


def test_the_size_is_in_the_header() -> None:
    assert image_size(MemorySplit(JPEG[:-100]), 0) == (21, 34)
    with pytest.raises(UnreadableImageError):
        image_size(MemorySplit(JPEG[:4]), 0)


def test_an_image_too_large_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for function in (decode_rgb, image_size):
        with pytest.raises(UnreadableImageError, match="decompression bomb"):
            function(MemorySplit(JPEG), 0)


@pytest.mark.parametrize("error", [TypeError, struct.error, EOFError, IndexError, SyntaxError, AssertionError])
def test_whatever_a_decoder_raises(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("broken tag")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(UnreadableImageError, match="broken tag"):
        decode_rgb(MemorySplit(JPEG), 0)


def test_a_full_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "open_image", fail)
    with pytest.raises(MemoryError):
        decode_rgb(MemorySplit(JPEG), 0)


def test_the_next_readable_image_takes_the_place_of_one_that_is_not() -> None:
    split = MemorySplit(JPEG, b"no image", b"no image", JPEG)
    substitutes = Substitutes(split)
    for _ in range(2):  # found out, and remembered
        passed: dict[int, str] = {}
        found = substitutes.decode(1, passed)
        assert found is not None
        assert found[0] == 3
        assert found[1].size == (34, 21)
        assert sorted(passed) == sorted(substitutes.unreadable) == [1, 2]
        assert "no image of a format that is read" in passed[2]
    assert substitutes.replace(np.arange(4)).tolist() == [0, 3, 3, 3]
    substitutes.unreadable[3] = "why"
    assert substitutes.find(2, {}) == 0  # around the end
    substitutes.unreadable[0] = "why"
    assert substitutes.find(2, passed) is None
    assert sorted(passed) == [0, 1, 2, 3]


def test_a_disk_that_went_away_is_not_asked_for_every_image() -> None:
    passed: dict[int, str] = {}
    substitutes = Substitutes(MemorySplit(*[b"no image"] * 40))
    assert substitutes.decode(35, passed) is None
    assert sorted(passed) == [0, 1, 2, 3, 4, 5, 35, 36, 37, 38, 39]
