"""What the markers of a JPEG say, without decoding it (ITU-T T.81)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

START, END, SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
MAX_SCANS = 100
"""A JPEG of more takes minutes to decode; progressive ones have about 10."""
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_NOT_A_FRAME = {0xC4, 0xC8, 0xCC}
"""DHT, JPG and DAC, between the start-of-frame markers C0 … CF."""


class DamagedJpegError(ValueError):
    """The bytes are no whole JPEG; the message says why."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """A JPEG whose markers are in order and that ends with an end of image."""

    width: int
    height: int
    frame: int
    """The start-of-frame marker, 0xC0 … 0xCF."""
    precision: int
    """Bits a component."""
    component_ids: bytes
    """One byte a component."""
    is_padded: bool = False
    """Whether fill bytes, or markers without a segment, lie between its segments."""
    adobe_transform: int | None = None
    """Of an Adobe APP14 marker: 0 none (RGB, CMYK), 1 YCbCr, 2 YCCK."""

    @property
    def obstacle(self) -> str:
        """Why some decoder of training (libjpeg-turbo, nvJPEG, DALI) would not read it as we mean it; "" if none."""
        if self.precision != 8:
            return f"{self.precision} bits"
        if self.frame >= 0xC9:
            return "arithmetic coding"
        if self.frame not in (0xC0, 0xC1, 0xC2):
            return "lossless or hierarchical JPEG"
        if len(self.component_ids) == 4:
            return "CMYK"
        if len(self.component_ids) not in (1, 3):
            return f"{len(self.component_ids)} components"
        if self.component_ids == b"RGB" or (len(self.component_ids) == 3 and self.adobe_transform == 0):
            return "RGB colour space"
        return ""


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walks the markers up to the first scan, and looks for the end of the image behind it.

    Bytes after the end of the image are allowed. Damage inside a scan is not seen. Raises DamagedJpegError.
    """
    if data[:2] != START:
        raise DamagedJpegError("it does not begin with a start of image")
    frame: JpegHeader | None = None
    transform: int | None = None
    is_padded = False
    position, size = 2, len(data)
    while True:
        if position + 2 > size:
            raise DamagedJpegError("it ends before its scan")
        if data[position] != 0xFF:
            raise DamagedJpegError(f"there is no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE:
            position += 1 if marker == 0xFF else 2  # the first is a fill byte
            is_padded = True
            continue
        if marker == 0xD9 or position + 4 > size:
            raise DamagedJpegError("it ends before its scan")
        length = data[position + 2] << 8 | data[position + 3]
        begin, position = position + 4, position + 2 + length
        if length < 2 or position > size:
            raise DamagedJpegError(f"its marker {marker:02X} at byte {begin - 4} is cut short")
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_A_FRAME:
            if frame or length < 8 or length < 8 + 3 * data[begin + 5]:
                raise DamagedJpegError("its frame header is damaged")
            precision, height, width, components = struct.unpack_from(">BHHB", data, begin)
            frame = JpegHeader(width, height, marker, precision, data[begin + 6 : begin + 6 + 3 * components : 3])
        elif marker == 0xEE and length >= 14 and data[begin : begin + 5] == b"Adobe":
            transform = data[begin + 11]
        elif marker == 0xDA:
            break
    if frame is None:
        raise DamagedJpegError("it has no frame header before its scan")
    if frame.width < 1 or frame.height < 1:
        raise DamagedJpegError(f"its header says {frame.width} x {frame.height} pixels")
    # Of a frame with all components in its first scan, libjpeg decodes that scan alone; counting reads all bytes.
    one_scan = frame.frame in (0xC0, 0xC1) and data[begin] >= len(frame.component_ids)
    if not one_scan and (scans := data.count(SCAN, position)) >= MAX_SCANS:
        raise DamagedJpegError(f"its {scans:,} scans would take minutes to decode")
    if data.rfind(END, position) < 0:
        raise DamagedJpegError("it is truncated: there is no end of image")
    return replace(frame, adobe_transform=transform, is_padded=is_padded)
