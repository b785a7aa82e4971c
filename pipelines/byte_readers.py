"""Encoded images by index, a batch at a time: of .betons, tars and folders, with their sizes and read-ahead.

Files are read with `os.pread` into one buffer per batch, and not memory-mapped: a mapped file that is truncated while
training kills the process without a word (SIGBUS); here it is an `UnreadableImageError` that names the sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from dataset_tools.files import ByteFile
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
        is_raw: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """buffer: uint8 [total]; offsets: int64 [B + 1]; unreadable: row -> reason; is_raw: bool [B], whether they are
        pixels, uint8 [H, W, 3]; by default none are.
        """
        self.buffer, self.offsets, self.unreadable = buffer, offsets, unreadable
        self.is_raw = np.zeros(len(self), dtype=np.bool_) if is_raw is None else is_raw

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
    def sizes(self, indices: Indices) -> tuple[Sizes, Sizes, dict[int, str]]:
        """(heights, widths), int64 [B] each, pixels; and row -> reason of those that cannot be told: 1 x 1 here."""

    def will_need(self, indices: Indices) -> None:  # noqa: B027 - a hint
        """These images will be read soon: the system may fetch them from the disk."""


def open_bytes(split: Split) -> ByteReader:
    """The reader for a split: positioned reads where its images are pieces of files, else image by image."""
    base, chosen = base_of(split)
    if isinstance(base, ConvertedSplit):
        records = base.records
        sizes = np.stack([records["height"], records["width"]], axis=1).astype(np.int32)
        shards = np.array(records["shard"], dtype=np.int32)
        offsets, lengths = (np.array(records[name], dtype=np.int64) for name in ("offset", "num_bytes"))
        is_raw = np.array(records["encoding"] == RAW)
        return ExtentReader(split, base.files, chosen, shards, offsets, lengths, sizes, is_raw)
    if isinstance(base, ExtentSplit):
        offsets, lengths = (np.ascontiguousarray(base.extents[:, column]) for column in (0, 1))
        return ExtentReader(split, (base.file,), chosen, None, offsets, lengths)
    return SplitReader(split)


class SplitReader(ByteReader):
    """Any split, through `Split.read`: image folders."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self._sizes = _KnownSizes(split, None)

    def read(self, indices: Indices) -> EncodedImages:
        pieces: list[bytes] = []
        unreadable: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                pieces.append(self.split.read(index))
            except OSError as error:
                pieces.append(b"")
                unreadable[row] = str(error)
        offsets = np.concatenate(([0], np.cumsum([len(piece) for piece in pieces]))).astype(np.int64)
        return EncodedImages(np.frombuffer(bytearray().join(pieces), dtype=np.uint8), offsets, unreadable)

    def sizes(self, indices: Indices) -> tuple[Sizes, Sizes, dict[int, str]]:
        return self._sizes.of(indices)


class ExtentReader(ByteReader):
    """Images that are pieces of a few files."""

    def __init__(
        self,
        split: Split,
        files: tuple[ByteFile, ...],
        chosen: Indices | None,
        shards: npt.NDArray[np.int32] | None,
        offsets: Indices,
        lengths: Indices,
        sizes: npt.NDArray[np.int32] | None = None,
        is_raw: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """chosen: int64 [N], where image i of the split stands in the other arrays; None: at i. shards: which file;
        None: the first. offsets, lengths: bytes. sizes: int32 [·, 2], height and width, where they are known. is_raw:
        which are pixels; None: none.
        """
        super().__init__(split)
        self._files, self._chosen, self._shards = files, chosen, shards
        self._offsets, self._lengths, self._is_raw = offsets, lengths, is_raw
        if sizes is not None and chosen is not None:
            sizes = sizes[chosen]
        self._sizes = _KnownSizes(split, sizes)

    def read(self, indices: Indices) -> EncodedImages:
        rows, shards = self._places(indices)
        lengths = self._lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        buffer = np.empty(int(offsets[-1]), dtype=np.uint8)
        view = buffer.data
        unreadable: dict[int, str] = {}
        for row in np.argsort(shards * (1 << 48) + self._offsets[rows], kind="stable").tolist():  # as they lie on disk
            piece = view[offsets[row] : offsets[row + 1]]
            try:
                self._files[shards[row]].read_into(int(self._offsets[rows[row]]), piece, self.split.names[indices[row]])
            except OSError as error:
                unreadable[row] = str(error)
        return EncodedImages(buffer, offsets, unreadable, None if self._is_raw is None else self._is_raw[rows])

    def sizes(self, indices: Indices) -> tuple[Sizes, Sizes, dict[int, str]]:
        return self._sizes.of(indices)

    def will_need(self, indices: Indices) -> None:
        rows, shards = self._places(indices)
        for row, shard in zip(rows.tolist(), shards.tolist(), strict=True):
            self._files[shard].will_need(int(self._offsets[row]), int(self._lengths[row]))

    def _places(self, indices: Indices) -> tuple[Indices, npt.NDArray[np.int64]]:
        """Where the images stand in the arrays, and the number of their file: int64 [B] each."""
        rows = indices if self._chosen is None else self._chosen[indices]
        shards = np.zeros(len(rows), dtype=np.int64) if self._shards is None else self._shards[rows].astype(np.int64)
        return rows, shards


class _KnownSizes:
    """Height and width of each image of a split: known, or looked up once in its header."""

    def __init__(self, split: Split, sizes: npt.NDArray[np.int32] | None) -> None:
        """sizes: int32 [N, 2], or None if they are all to be looked up. Memory: 8 bytes an image."""
        self._split = split
        self._sizes = np.zeros((len(split), 2), dtype=np.int32) if sizes is None else sizes
        self._reasons: dict[int, str] = {}

    def of(self, indices: Indices) -> tuple[Sizes, Sizes, dict[int, str]]:
        for index in indices[self._sizes[indices, 0] == _UNKNOWN].tolist():
            try:
                self._sizes[index] = image_size(self._split, index)
            except UnreadableImageError as error:
                self._reasons[index] = str(error)  # first: other threads look for it when they see the size
                self._sizes[index] = _UNREADABLE
        sizes = self._sizes[indices].astype(np.int64)
        bad = np.flatnonzero(sizes[:, 0] == _UNREADABLE)
        sizes[bad] = 1
        return sizes[:, 0], sizes[:, 1], {row: self._reasons[int(indices[row])] for row in bad.tolist()}


def base_of(split: Split) -> tuple[Split, Indices | None]:
    """The split that a subset, however nested, was taken from, and the indices in it."""
    chosen: Indices | None = None
    while isinstance(split, SubsetSplit):
        chosen = split.indices if chosen is None else split.indices[chosen]
        split = split.parent
    return split, chosen
