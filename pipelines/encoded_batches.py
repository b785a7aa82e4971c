"""A batch of encoded images with their boxes; and which JPEGs another decoder than Pillow may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dataset_tools.conversion.jpeg import END, START, DamagedJpegError, JpegHeader, read_jpeg_header
from dataset_tools.images import MAX_PIXELS
from pipelines.byte_readers import Indices
from pipelines.crops import Boxes, Sizes

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class EncodedBatch:
    """A rank's batch: B images with V placed boxes each. B is 0 where too many were unreadable to go on."""

    epoch: int
    step: int
    indices: Indices  # [B]
    heights: Sizes  # [B]
    widths: Sizes  # [B]
    boxes: Boxes  # [B, V, 8]
    images: list[Bytes]
    """B times an encoded image, uint8 [num_bytes], or pixels (raw ones, or decoded by Pillow), uint8 [H, W, 3]."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Index of each image that had to be replaced here -> the reason."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, pieces: Sequence[EncodedBatch]) -> EncodedBatch:
        """One batch of some pieces of it; of no image if too many of a piece were unreadable."""
        unreadable = {index: reason for piece in pieces for index, reason in piece.unreadable.items()}
        if len(pieces) == 1 or not all(map(len, pieces)):
            return replace(min(pieces, key=len), unreadable=unreadable)
        arrays = ("indices", "heights", "widths", "boxes")
        columns = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in arrays}
        images = [image for piece in pieces for image in piece.images]
        return cls(pieces[0].epoch, pieces[0].step, **columns, images=images, unreadable=unreadable)


def plain_header(image: Bytes) -> JpegHeader | None:
    """The header of a JPEG in which any decoder sees what Pillow sees: whole, of a common kind, its markers in order.

    All else goes to Pillow, since decoders on GPUs throw or crash at what libjpeg puts up with.
    """
    if image[:2].tobytes() != START or image[-2:].tobytes() != END:
        return None
    try:
        header = read_jpeg_header(image.tobytes())
    except DamagedJpegError:
        return None
    is_plain = not header.obstacle and not header.is_padded and header.width * header.height <= MAX_PIXELS
    return header if is_plain else None
