"""What is known of each sample of a converted split: one row while it is written, one columnar file afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.packed_names import PackedNames

HASH_BYTES = 16
"""A sample is known by the first half of its SHA-256."""

ROW = np.dtype(
    [
        ("source_index", "<i8"),
        ("position", "<i8"),
        ("offset", "<i8"),
        ("num_bytes", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("label", "<i4"),
        ("shard", "<i4"),
        ("encoding", "u1"),
        ("handling", "u1"),
        ("hash", "u1", (HASH_BYTES,)),
    ]
)
"""One sample. `source_index`: its index in the split it came from; `position`: its place in the order of the whole
split, rejected images counted; `offset`, `num_bytes`: where its encoded image lies in file number `shard`; `width`,
`height` in pixels; `label`: rank of its class, or -1; `encoding`, `handling`: see below; `hash`: of these bytes.
"""

JPG, RAW, PNG = 0, 1, 2
"""Values of `encoding`; JPG and RAW (uint8 [H, W, 3]) are also FFCV's image modes."""
EXTENSIONS = {JPG: "jpg", RAW: "raw", PNG: "png"}
PASSED_THROUGH, REENCODED = 0, 1
"""Values of `handling`."""

BLOCK_ROWS = 1 << 16
TYPE_NAMES = {"<i8": "I64", "<i4": "I32", "|u1": "U8"}
"""numpy's names of the types of columns → those of a safetensors file."""
_TYPES = {name: np.dtype(code) for code, name in TYPE_NAMES.items()}


class SampleRecords:
    """The columns of ROW for N samples, and their `names`: memory-mapped, so that opening costs nothing.

    The file is a safetensors file (a JSON header, then the columns one behind the other), which its library reads,
    too. `names` are those of the source, `name_ends` and `name_bytes` in the file.
    """

    def __init__(self, path: Path, columns: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column of ROW, [N] or, for `hash`, [N, 16]."""
        return self.columns[column]

    def names(self) -> PackedNames:
        """The names, in memory. Raises ValueError if they are damaged."""
        try:
            return PackedNames.from_buffers(self.columns["name_bytes"].tobytes(), np.array(self.columns["name_ends"]))
        except ValueError as error:
            raise ValueError(f"the record file {self.path} is damaged: its name {error}") from error

    def rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Samples [start, stop) as rows, in memory."""
        chosen = {name: self.columns[name][start:stop] for name in ROW.names or ()}
        rows = np.empty(len(chosen["label"]), dtype=ROW)
        for name, column in chosen.items():
            rows[name] = column
        return rows

    def blocks(self) -> Iterator[tuple[NDArray[np.void], int]]:
        """All samples as rows, a block at a time, with the number of the first one."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.rows(start, start + BLOCK_ROWS), start

    @classmethod
    def open(cls, path: Path) -> SampleRecords:
        """Raises FileNotFoundError, or ValueError if the file is cut short or damaged."""
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            try:
                if not 2 <= header_bytes <= size - 8:
                    raise ValueError("its header does not fit in it")
                layout = json.loads(file.read(header_bytes))
                layout.pop("__metadata__", None)
                columns = {
                    name: _mapped(path, size, 8 + header_bytes, entry["dtype"], entry["shape"], entry["data_offsets"])
                    for name, entry in layout.items()
                }
                _check(columns)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"the record file {path} is damaged: {error}") from error
        return cls(path, columns)


def _mapped(path: Path, size: int, base: int, type_name: str, shape: list[int], extent: list[int]) -> NDArray[Any]:
    dtype, (begin, stop) = _TYPES[type_name], extent
    if dtype.itemsize * int(np.prod(shape)) != stop - begin or begin < 0 or base + stop > size:
        raise ValueError("a column does not fit in it")
    if begin == stop:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=base + begin, shape=tuple(shape))


def _check(columns: dict[str, NDArray[Any]]) -> None:
    names = {*(ROW.names or ()), "name_ends", "name_bytes"}
    if columns.keys() != names:
        raise ValueError(f"its columns are {', '.join(sorted(columns))} and not {', '.join(sorted(names))}")
    count = len(columns["label"])
    for name in ROW.names or ():
        if columns[name].dtype != ROW[name].base or columns[name].shape != (count, *ROW[name].shape):
            raise ValueError(f"its column {name} is {columns[name].dtype} {columns[name].shape}")
    if columns["name_ends"].shape != (count + 1,):
        raise ValueError(f"it names {len(columns['name_ends']) - 1} of {count} samples")
