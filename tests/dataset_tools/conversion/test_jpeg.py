"""What the markers of a JPEG say; Pillow is the oracle of the dimensions."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from dataset_tools.conversion.jpeg import DamagedJpegError, JpegHeader, read_jpeg_header
from dataset_tools.sources import open_source
from tests.dataset_tools.conversion.pictures import encoded, picture

SCAN = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 63, 0) + b"\x12\x34\xff\x00\x56"
END = b"\xff\xd9"


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def frame(marker: int = 0xC0, precision: int = 8, height: int = 30, width: int = 40, ids: bytes = b"\1\2\3") -> bytes:
    components = b"".join(bytes([component, 0x11, 0]) for component in ids)
    return segment(marker, struct.pack(">BHHB", precision, height, width, len(ids)) + components)


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


def jpeg(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + SCAN + END


def test_all_fields() -> None:
    assert read_jpeg_header(jpeg(adobe(1), frame(0xC2, 8, 1234, 56789, b"\0\1\2"))) == JpegHeader(
        width=56789, height=1234, frame=0xC2, precision=8, component_ids=b"\0\1\2", adobe_transform=1
    )
    assert read_jpeg_header(jpeg(frame())).adobe_transform is None


OBSTACLES: dict[str, list[bytes]] = {
    "": [
        *(frame(), frame(0xC1), frame(0xC2), frame(ids=b"\1"), frame(ids=b"\0\1\2")),
        *(adobe(1) + frame(), adobe(0) + frame(ids=b"\1")),
    ],
    "12 bits": [frame(0xC1, precision=12)],
    "16 bits": [frame(0xC3, precision=16)],
    "lossless or hierarchical JPEG": [frame(0xC3), frame(0xC5), frame(0xC6), frame(0xC7)],
    "arithmetic coding": [frame(0xC9), frame(0xCA), frame(0xCF)],
    "CMYK": [frame(ids=b"\1\2\3\4"), adobe(2) + frame(ids=b"\1\2\3\4")],
    "2 components": [frame(ids=b"\1\2")],
    "5 components": [frame(ids=b"\1\2\3\4\5")],
    "RGB colour space": [frame(ids=b"RGB"), adobe(0) + frame(), frame() + adobe(0)],
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles(obstacle: str) -> None:
    for segments in OBSTACLES[obstacle]:
        assert read_jpeg_header(jpeg(segments)).obstacle == obstacle


@pytest.mark.parametrize(
    "data",
    [
        jpeg(b"\xff\xff\xff\xff", frame(), b"\xff"),
        jpeg(b"\xff\x01", frame()),
        jpeg(segment(0xC4, bytes(20)), frame(), segment(0xCC, bytes(4)), segment(0xC8, bytes(9))),
        jpeg(segment(0xE1, b"Exif\0\0" + jpeg(frame(height=1, width=1))), frame()),  # a thumbnail
        jpeg(segment(0xEE, b"Adob"), segment(0xEE, b"Adobe"), frame()),
        jpeg(segment(0xFE, END * 10), frame()),
        jpeg(segment(0xE2, bytes(65533)), frame()),
        jpeg(frame()) + b"trailing \xff",
        jpeg(frame())[:-2] + SCAN + SCAN + END + END,
    ],
)
def test_what_may_stand_around_the_frame(data: bytes) -> None:
    header = read_jpeg_header(data)
    assert (header.width, header.height, header.obstacle) == (40, 30, "")


DAMAGE = {
    "does not begin with a start of image": [b"", b"\xff", b"\x89PNG\r\n"],
    "it ends before its scan": [
        *(b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xff", b"\xff\xd8\xff\xe0\x00"),
        *(b"\xff\xd8" + frame(), b"\xff\xd8" + frame() + END),
    ],
    "there is no marker at byte 2": [b"\xff\xd8junk" + frame() + SCAN + END],
    "there is no marker at byte 21": [jpeg(frame(), b"\0\0")],
    "its marker E0 at byte 2 is cut short": [b"\xff\xd8\xff\xe0\x00\x01" + SCAN, b"\xff\xd8\xff\xe0\xff\xff" + SCAN],
    "its frame header is damaged": [
        *(jpeg(segment(0xC0, bytes(5))), jpeg(segment(0xC0, frame()[4:-1])), jpeg(frame(), frame())),
    ],
    "no frame header before its scan": [jpeg()],
    "its header says 40 x 0 pixels": [jpeg(frame(height=0))],
    "its header says 0 x 30 pixels": [jpeg(frame(width=0))],
    "truncated: there is no end of image": [
        *(jpeg(frame())[:-2], jpeg(frame())[:-1], jpeg(segment(0xE1, jpeg(frame())), frame())[:-2]),
    ],
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage(message: str) -> None:
    for data in DAMAGE[message]:
        with pytest.raises(DamagedJpegError, match=message):
            read_jpeg_header(data)


def test_no_prefix_of_a_jpeg_is_taken_for_a_whole_one() -> None:
    data = encoded(picture(), exif=bytes(0), comment=b"\xff\xd9")
    for size in range(len(data)):
        with pytest.raises(DamagedJpegError):
            read_jpeg_header(data[:size])
    assert read_jpeg_header(data).width == 40


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 3), (640, 1), (1, 480), (333, 251)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 1}, {"optimize": True}])
def test_dimensions_are_those_of_pillow(size: tuple[int, int], options: dict[str, object]) -> None:
    for mode, ids in (("RGB", b"\1\2\3"), ("L", b"\1"), ("CMYK", b"CMYK")):
        header = read_jpeg_header(encoded(picture(*size, mode), **options))
        assert ((header.width, header.height), header.component_ids) == (size, ids)
        assert header.frame == (0xC2 if options.get("progressive") else 0xC0)


@pytest.mark.real_data
def test_real_photographs(real_data) -> None:
    split = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
    gray = 0
    for index in range(len(split)):
        data = split.read(index)
        header = read_jpeg_header(data)
        with Image.open(io.BytesIO(data)) as image:
            assert (header.width, header.height) == image.size
            assert len(header.component_ids) == len(image.getbands())
        assert header.obstacle == ""
        gray += len(header.component_ids) == 1
    assert gray == 7
