"""Encoded images by index, many at a time: of .betons, tars and folders, with read-ahead.

Files are read with `os.pread` into one buffer per call, and not memory-mapped: a mapped file that is truncated while
training kills the process without a word (SIGBUS); here it is an `UnreadableImageError` that names the sample.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dataset_tools.files import ByteFile, raise_if_of_machine
from dataset_tools.formats.records import RAW
from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.sources.split import ExtentSplit, SubsetSplit

Indices = npt.NDArray[np.int64]


class EncodedImages(NamedTuple):
    """B images. One that could not be read has no bytes, and a reason."""

    images: list[npt.NDArray[np.uint8]]
    unreadable: dict[int, str]
    """Row -> reason."""
    raw_sizes: npt.NDArray[np.int32]
    """[B, 2], height and width of those that are pixels, uint8 [H, W, 3], and 0 for encoded ones."""


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
    return ByteReader(split)


class ByteReader:
    """Images of a split, one by one. May be used by several threads at once; holds file descriptors and no image."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def read(self, indices: Indices) -> EncodedImages:
        """The encoded images at ``indices`` (int64 [B]), in that order: JPEG, PNG, … or raw pixels.

        Raises nothing for an image that cannot be read: it is in ``unreadable``.
        """
        images: list[npt.NDArray[np.uint8]] = [np.empty(0, dtype=np.uint8)] * len(indices)
        unreadable: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                images[row] = np.frombuffer(bytearray(self.split.read(index)), dtype=np.uint8)
            except OSError as error:
                raise_if_of_machine(error)
                unreadable[row] = str(error)
        return EncodedImages(images, unreadable, np.zeros((len(images), 2), dtype=np.int32))

    def will_need(self, indices: Indices) -> None:
        """These images will be read soon: the system may fetch them from the disk."""
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
        images = np.split(buffer, ends[1:-1]) if len(indices) else []
        unreadable: dict[int, str] = {}
        for row in np.argsort(shards * (1 << 48) + offsets, kind="stable").tolist():  # as they lie on disk
            try:
                self._files[shards[row]].read_into(int(offsets[row]), images[row].data, self.split.names[indices[row]])
            except OSError as error:
                raise_if_of_machine(error)
                unreadable[row] = str(error)
        no_sizes = np.zeros((len(indices), 2), dtype=np.int32)
        return EncodedImages(images, unreadable, no_sizes if self._raw_sizes is None else self._raw_sizes[indices])

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
