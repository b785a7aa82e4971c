"""Many strings in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class PackedNames(Sequence[str]):
    """An immutable list of N strings: one bytes `blob` (UTF-8) and int64 `offsets` [N + 1].

    Costs the text and 8 bytes a name, where a list of `str` costs the text and about 65; two buffers pickle
    fast, and forked workers share them. File names that are not valid UTF-8 survive (surrogateescape).
    """

    __slots__ = ("blob", "offsets")

    blob: bytes
    offsets: NDArray[np.int64]

    def __init__(self, names: Iterable[str] = ()) -> None:
        blob, offsets = BytesIO(), array("q", [0])
        for name in names:
            offsets.append(offsets[-1] + blob.write(name.encode("utf-8", "surrogateescape")))
        self.blob = blob.getvalue()  # unlike bytes(bytearray), not a copy
        self.offsets = np.frombuffer(offsets, dtype=np.int64)

    @classmethod
    def from_buffers(cls, blob: bytes, offsets: NDArray[np.int64]) -> PackedNames:
        """The inverse of `.blob`, `.offsets`."""
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(blob) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"offsets do not describe a blob of {len(blob)} bytes")
        packed = cls.__new__(cls)
        packed.blob, packed.offsets = blob, offsets
        return packed

    @classmethod
    def from_arrays(cls, saved: Any, key: str) -> PackedNames:
        """The inverse of `as_arrays`. Raises ValueError or KeyError."""
        return cls.from_buffers(saved[f"{key}_blob"].tobytes(), saved[f"{key}_ends"])

    def as_arrays(self, key: str) -> dict[str, NDArray[Any]]:
        """Two arrays for an .npz, whose names begin with `key`."""
        return {f"{key}_blob": np.frombuffer(self.blob, dtype=np.uint8), f"{key}_ends": self.offsets}

    def select(self, indices: NDArray[np.int64]) -> PackedNames:
        """The names at `indices` (int64 [M], in [0, N)), in that order."""
        starts = self.offsets[indices]
        offsets = np.concatenate(([0], np.cumsum(self.offsets[indices + 1] - starts)))
        letters, chosen = np.frombuffer(self.blob, dtype=np.uint8), BytesIO()
        for begin in range(0, len(indices), 1 << 14):  # for little memory
            ends = offsets[begin : begin + (1 << 14) + 1]
            shifts = starts[begin : begin + (1 << 14)] - ends[:-1]  # from a letter's place here to that in the blob
            chosen.write(letters[np.arange(ends[0], ends[-1]) + np.repeat(shifts, np.diff(ends))].tobytes())
        return PackedNames.from_buffers(chosen.getvalue(), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PackedNames: ...
    def __getitem__(self, index: int | slice) -> str | PackedNames:
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self)), dtype=np.int64))
        position = range(len(self))[index]
        return self.blob[self.offsets[position] : self.offsets[position + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for stop in map(int, self.offsets[1:]):
            yield self.blob[start:stop].decode("utf-8", "surrogateescape")
            start = stop

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedNames):
            return NotImplemented
        return self.blob == other.blob and np.array_equal(self.offsets, other.offsets)
