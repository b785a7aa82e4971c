"""Encoded images by index, many at a time: of .betons, tars and folders, with read-ahead.

Files are read with `os.pread` into one buffer per call, and not memory-mapped: a mapped file that is truncated while
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

Indices = npt.NDArray[np.int64]


class EncodedImages:
    """The bytes of B images in one buffer. An image that could not be read has none, and a reason."""

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        offsets: Indices,
        unreadable: dict[int, str],
        raw_sizes: npt.NDArray[np.int32],
    ) -> None:
        """buffer: uint8 [total]; offsets: int64 [B + 1]; unreadable: row -> reason; raw_sizes: int32 [B, 2], height and
        width of those that are pixels, uint8 [H, W, 3], and 0 for encoded ones.
        """
        self.buffer, self.offsets, self.unreadable, self.raw_sizes = buffer, offsets, unreadable, raw_sizes

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """A view of one image's bytes."""
        return self.buffer[self.offsets[row] : self.offsets[row + 1]]


class ByteReader(ABC):
    """Images of a split. May be used by several threads at once; holds file descriptors and no image."""

    def __init__(self, split: Split) -> None:
        self.split = split

    @abstractmethod
    def read(self, indices: Indices) -> EncodedImages:
        """The encoded images at ``indices`` (int64 [B]), in that order: JPEG, PNG, … or raw pixels.

        Raises nothing for an image that cannot be read: it is in ``unreadable``.
        """

    @abstractmethod
    def will_need(self, indices: Indices) -> None:
        """These images will be read soon: the system may fetch them from the disk."""


def open_bytes(split: Split) -> ByteReader:
    """The reader for a split: positioned reads where its images are pieces of files, else image by image."""
    base, chosen = base_of(split)
    rows = slice(None) if chosen is None else chosen
    if isinstance(base, ConvertedSplit):
        offsets, lengths, shards = (np.array(base.records[name][rows]) for name in ("offset", "num_bytes", "shard"))
        is_raw = np.asarray(base.records["encoding"][rows] == RAW)
        raw_sizes = is_raw[:, None] * np.stack([base.records[side][rows] for side in ("height", "width")], axis=1)
        return ExtentReader(split, base.files, offsets, lengths, shards, raw_sizes if is_raw.any() else None)
    if isinstance(base, ExtentSplit):
        offsets, lengths = (np.ascontiguousarray(base.extents[rows, column]) for column in (0, 1))
        file_of = np.zeros(len(split), dtype=np.int32) if base.file_of is None else base.file_of[rows]
        return ExtentReader(split, base.files, offsets, lengths, file_of)
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
        return EncodedImages(buffer, offsets, unreadable, np.zeros((len(pieces), 2), dtype=np.int32))

    def will_need(self, indices: Indices) -> None:
        for index in indices.tolist():
            self.split.will_need(index)


class ExtentReader(ByteReader):
    """Images that are pieces of a few files."""

    def __init__(
        self,
        split: Split,
        files: tuple[ByteFile, ...],
        offsets: Indices,
        lengths: Indices,
        shards: npt.NDArray[np.int32],
        raw_sizes: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """offsets, lengths: [N], bytes. shards: [N], in which file an image is. raw_sizes: [N, 2], as `EncodedImages`
        has them; None if no image is raw.
        """
        super().__init__(split)
        self._files, self._offsets, self._lengths, self._shards = files, offsets, lengths, shards
        self._raw_sizes = raw_sizes

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
        no_sizes = np.zeros((len(indices), 2), dtype=np.int32)
        return EncodedImages(
            buffer, ends, unreadable, no_sizes if self._raw_sizes is None else self._raw_sizes[indices]
        )

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
