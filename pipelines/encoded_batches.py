"""Batches of encoded images with their boxes, for loaders that decode by themselves: what is unreadable is replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dataset_tools.conversion.jpeg import END, START, DamagedJpegError, JpegHeader, read_jpeg_header
from dataset_tools.images import MAX_PIXELS
from dataset_tools.sources import Split
from pipelines.byte_readers import Indices, open_bytes
from pipelines.config import ViewConfig
from pipelines.crops import Boxes, Sizes
from pipelines.decode import Substitutes, UnreadableImageError, decode_bytes
from pipelines.order import Order
from pipelines.views import ViewRecipe, draw_boxes

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_MAX_LOGGED = 10
_MANY_REFUSED = 4


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


class EncodedBatches:
    """Any batch of any epoch; may be used by several threads at once.

    An image that cannot be read is replaced by the next one that can. Plain JPEGs are handed out as they are; what
    another decoder than Pillow might see differently (cut JPEGs, other formats) is decoded by Pillow.
    """

    def __init__(
        self,
        split: Split,
        views: ViewRecipe,
        view_config: ViewConfig,
        order: Order,
        *,
        seed: int,
        is_plain: Callable[[JpegHeader], bool],
    ) -> None:
        """is_plain: whether a decoder sees in a JPEG that passed `plain_header` what Pillow sees."""
        self.split, self.views, self.view_config, self.order, self.seed = split, views, view_config, order, seed
        self._is_plain = is_plain
        self._reader = open_bytes(split)
        self._substitutes = Substitutes(split)
        self.for_pillow: set[int] = set()
        """Images that Pillow decodes, whatever they are."""

    def prepare(self, epoch: int, step: int, indices: Indices | None = None) -> EncodedBatch:
        """The batch of this rank, or the piece of it with these ``indices``; see `EncodedBatch.joined`.

        Raises nothing for an image that cannot be read.
        """
        indices = (self.order.indices(epoch, step) if indices is None else indices).copy()
        images: list[Bytes] = [np.empty(0, dtype=np.uint8)] * len(indices)
        heights, widths = np.ones_like(indices), np.ones_like(indices)
        unreadable: dict[int, str] = {}
        missing = np.arange(len(indices))
        while len(missing):
            if self._substitutes.unreadable:
                found = [self._substitutes.find(index, unreadable) for index in indices[missing].tolist()]
                if None in found:  # so many are unreadable that the run ends
                    indices, heights, widths, images = indices[:0], heights[:0], widths[:0], []
                    break
                indices[missing] = np.array(found, dtype=np.int64)
            encoded = self._reader.read(indices[missing])
            failed = []
            for place, row in enumerate(missing.tolist()):
                index, reason = int(indices[row]), encoded.unreadable.get(place)
                if reason is None:
                    try:
                        images[row], size = self._opened(index, encoded[place], encoded.raw_sizes[place].tolist())
                        heights[row], widths[row] = size
                    except UnreadableImageError as error:
                        reason = str(error)
                if reason is not None:
                    self._substitutes.unreadable[index] = reason
                    failed.append(row)
            missing = np.array(failed, dtype=np.int64)
        boxes = draw_boxes(self.views, self.view_config, heights, widths, self.seed, epoch, indices)
        return EncodedBatch(epoch, step, indices, heights, widths, boxes, images, unreadable)

    def _opened(self, index: int, image: Bytes, raw_size: Sequence[int]) -> tuple[Bytes, tuple[int, int]]:
        """What is handed out of an image, and its height and width. Raises `UnreadableImageError`."""
        height, width = raw_size
        if height:
            if len(image) != 3 * height * width:
                raise UnreadableImageError(f"its {len(image)} bytes are not {height} x {width} pixels")
            return image.reshape(height, width, 3), (height, width)
        header = None if index in self.for_pillow else plain_header(image)
        if header is not None and self._is_plain(header):
            return image, (header.height, header.width)
        pixels = np.array(decode_bytes(image.tobytes()))  # a copy, which may be written to: some ask for that
        return pixels, (pixels.shape[0], pixels.shape[1])

    def will_need(self, indices: Indices) -> None:
        """These images will be read soon: the system may fetch them from the disk."""
        self._reader.will_need(indices)

    def mark_unreadable(self, index: int, reason: str) -> None:
        """From now on another image takes the place of this one."""
        self._substitutes.unreadable[index] = reason

    def mark_for_pillow(self, refused: list[int], num_tried: int, decoder: str, error: Exception) -> None:
        """From now on these images, which a decoder refused and Pillow reads, are decoded by Pillow.

        The first ones are logged. Raises RuntimeError if they are all of several that it tried: then it is the decoder.
        """
        if len(refused) == num_tried >= _MANY_REFUSED:
            raise RuntimeError(
                f"{decoder} decodes none of the {num_tried} images of a batch, and Pillow decodes all of them: {error}"
            ) from error
        for index in refused:
            self.for_pillow.add(index)
            if self.num_for_pillow <= _MAX_LOGGED:
                last = "; others will not be named" if self.num_for_pillow == _MAX_LOGGED else ""
                log.warning("%s cannot decode %s, Pillow does%s", decoder, self.split.names[index], last)

    @property
    def num_for_pillow(self) -> int:
        """How many images have been marked as ones that Pillow decodes."""
        return len(self.for_pillow)


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
