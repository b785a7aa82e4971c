"""Encoded images by index, a batch at a time: of .betons, tars and folders, with their sizes and read-ahead.

Files are read with `os.pread` into one buffer per batch, and not memory-mapped: a mapped file that is truncated while
training kills the process without a word (SIGBUS); here it is an `UnreadableImageError` that names the sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from dataset_tools.files import ByteFile, raise_if_of_machine
from dataset_tools.formats.records import RAW
from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.sources.split import ExtentSplit, SubsetSplit
from pipelines.decode import UnreadableImageError, image_size

Indices = npt.NDArray[np.int64]
Sizes = npt.NDArray[np.int64]

_UNKNOWN, _UNREADABLE = 0, -1


class EncodedImages:
    """The bytes of B images in one buffer. An image that could not be read has none, and a reason."""

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        offsets: Indices,
        unreadable: dict[int, str],
        is_raw: npt.NDArray[np.bool_],
    ) -> None:
        """buffer: uint8 [total]; offsets: int64 [B + 1]; unreadable: row -> reason; is_raw: bool [B], whether they are
        pixels, uint8 [H, W, 3].
        """
        self.buffer, self.offsets, self.unreadable, self.is_raw = buffer, offsets, unreadable, is_raw

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """A view of one image's bytes."""
        return self.buffer[self.offsets[row] : self.offsets[row + 1]]


class ByteReader(ABC):
    """Images of a split. May be used by several threads at once; holds file descriptors and no image."""

    def __init__(self, split: Split, sizes: npt.NDArray[np.int32] | None = None) -> None:
        """sizes: int32 [N, 2], height and width of each image; None: they are looked up in its header, once. Memory: 8
        bytes an image.
        """
        self.split = split
        self._sizes = np.zeros((len(split), 2), dtype=np.int32) if sizes is None else sizes
        self._reasons: dict[int, str] = {}

    @abstractmethod
    def read(self, indices: Indices) -> EncodedImages:
        """The encoded images at ``indices`` (int64 [B]), in that order: JPEG, PNG, … or raw pixels.

        Raises nothing for an image that cannot be read: it is in ``unreadable``.
        """

    def will_need(self, indices: Indices) -> None:  # noqa: B027 - a hint
        """These images will be read soon: the system may fetch them from the disk."""

    def sizes(self, indices: Indices) -> tuple[Sizes, Sizes, dict[int, str]]:
        """(heights, widths), int64 [B] each, pixels; and row -> reason of those that are unknown: 1 x 1 here."""
        for index in indices[self._sizes[indices, 0] == _UNKNOWN].tolist():
            try:
                self._sizes[index] = image_size(self.split, index)
            except UnreadableImageError as error:
                self._reasons[index] = str(error)  # first: other threads look for it when they see the size
                self._sizes[index] = _UNREADABLE
        sizes = self._sizes[indices].astype(np.int64)
        bad = np.flatnonzero(sizes[:, 0] == _UNREADABLE)
        sizes[bad] = 1
        return sizes[:, 0], sizes[:, 1], {row: self._reasons[int(indices[row])] for row in bad.tolist()}


def open_bytes(split: Split) -> ByteReader:
    """The reader for a split: positioned reads where its images are pieces of files, else image by image."""
    base, chosen = base_of(split)
    rows = slice(None) if chosen is None else chosen
    if isinstance(base, ConvertedSplit):
        offsets, lengths, shards = (np.array(base.records[name][rows]) for name in ("offset", "num_bytes", "shard"))
        sizes = np.stack([base.records["height"][rows], base.records["width"][rows]], axis=1).astype(np.int32)
        is_raw = np.array(base.records["encoding"][rows] == RAW)
        return ExtentReader(split, base.files, offsets, lengths, shards, is_raw, sizes)
    if isinstance(base, ExtentSplit):
        offsets, lengths = (np.ascontiguousarray(base.extents[rows, column]) for column in (0, 1))
        zeros = np.zeros(len(split), dtype=np.int32)
        return ExtentReader(split, (base.file,), offsets, lengths, zeros, zeros > 0)
    return SplitReader(split)


class SplitReader(ByteReader):
    """Any split, through `Split.read`: image folders."""

    def read(self, indices: Indices) -> EncodedImages:
        pieces: list[bytes] = []
        unreadable: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                pieces.append(self.split.read(index))
            except OSError as error:
                raise_if_of_machine(error)
                pieces.append(b"")
                unreadable[row] = str(error)
        offsets = np.concatenate(([0], np.cumsum([len(piece) for piece in pieces]))).astype(np.int64)
        buffer = np.frombuffer(bytearray().join(pieces), dtype=np.uint8)
        return EncodedImages(buffer, offsets, unreadable, np.zeros(len(pieces), dtype=np.bool_))


class ExtentReader(ByteReader):
    """Images that are pieces of a few files."""

    def __init__(
        self,
        split: Split,
        files: tuple[ByteFile, ...],
        offsets: Indices,
        lengths: Indices,
        shards: npt.NDArray[np.int32],
        is_raw: npt.NDArray[np.bool_],
        sizes: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """offsets, lengths: [N], bytes. shards: [N], in which file an image is. is_raw: [N], whether it is pixels."""
        super().__init__(split, sizes)
        self._files, self._offsets, self._lengths, self._shards = files, offsets, lengths, shards
        self._is_raw = is_raw

    def read(self, indices: Indices) -> EncodedImages:
        offsets, shards = self._offsets[indices], self._shards[indices].astype(np.int64)
        ends = np.concatenate(([0], np.cumsum(self._lengths[indices])))
        buffer = np.empty(int(ends[-1]), dtype=np.uint8)
        view = buffer.data
        unreadable: dict[int, str] = {}
        for row in np.argsort(shards * (1 << 48) + offsets, kind="stable").tolist():  # as they lie on disk
            piece = view[ends[row] : ends[row + 1]]
            try:
                self._files[shards[row]].read_into(int(offsets[row]), piece, self.split.names[indices[row]])
            except OSError as error:
                raise_if_of_machine(error)
                unreadable[row] = str(error)
        return EncodedImages(buffer, ends, unreadable, self._is_raw[indices])

    def will_need(self, indices: Indices) -> None:
        places = (column[indices].tolist() for column in (self._shards, self._offsets, self._lengths))
        for shard, offset, length in zip(*places, strict=True):
            self._files[shard].will_need(offset, length)


def base_of(split: Split) -> tuple[Split, Indices | None]:
    """The split that a subset, however nested, was taken from, and the indices in it."""
    chosen: Indices | None = None
    while isinstance(split, SubsetSplit):
        chosen = split.indices if chosen is None else split.indices[chosen]
        split = split.parent
    return split, chosen
