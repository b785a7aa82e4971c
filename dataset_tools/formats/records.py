"""What is known of each sample of a converted split: one row while it is written, one columnar file afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from dataset_tools.files import open_regular, raise_if_of_machine
from dataset_tools.images import MAX_PIXELS
from dataset_tools.packed_names import PackedNames
from dataset_tools.schema import decode_json

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
MAX_HEADER_BYTES = 1 << 20
MAX_SIDE = (1 << 16) - 1
"""Of a sample, pixels: FFCV stores width and height in 16 bits."""
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

    def check(self, file_bytes: Sequence[int], num_classes: int) -> None:
        """Looks at every row, once: loaders read and allocate what a row says.

        `file_bytes`: the sizes of the image files. Raises ValueError, which names the first row that cannot be.
        """
        for rows, start in self.blocks():
            sizes = np.array([*file_bytes, 0], dtype=np.int64)[np.clip(rows["shard"], -1, len(file_bytes))]
            width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
            right = {
                "shard": (rows["shard"] >= 0) & (rows["shard"] < len(file_bytes)),
                "num_bytes": (rows["num_bytes"] > 0) & (rows["num_bytes"] <= sizes),
                "offset": (rows["offset"] >= 0) & (rows["offset"] <= sizes - rows["num_bytes"]),
                "width": (width > 0) & (width <= MAX_SIDE),
                "height": (height > 0) & (height <= MAX_SIDE) & (width * height <= MAX_PIXELS),
                "label": (rows["label"] >= -1) & (rows["label"] < num_classes),
                "encoding": rows["encoding"] <= PNG,
                "handling": rows["handling"] <= REENCODED,
                "position": rows["position"] >= 0,
                "source_index": rows["source_index"] >= 0,
            }
            right["num_bytes"] &= (rows["encoding"] != RAW) | (rows["num_bytes"] == 3 * width * height)
            for column, each in right.items():
                if not each.all():
                    index = int(np.argmin(each))
                    raise ValueError(
                        f"{self.path} is damaged: sample {start + index} has the {column} {rows[column][index]}"
                    )

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
        try:
            with open_regular(path) as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
                    raise ValueError("its header does not fit in it")
                layout = decode_json(file.read(header_bytes), dict[str, _Column], "its header")
            columns = {name: column.mapped(path, size, 8 + header_bytes) for name, column in layout.items()}
            _check(columns)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError):
                raise_if_of_machine(error)
            raise ValueError(f"the record file {path} is damaged: {error}") from error
        return cls(path, columns)


class _Column(Struct):
    """Of the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 40)]], Meta(max_length=2)]
    data_offsets: tuple[int, int]

    def mapped(self, path: Path, size: int, base: int) -> NDArray[Any]:
        if self.dtype not in _TYPES:
            raise ValueError(f"a column is of type {self.dtype[:20]!r}, not one of {', '.join(_TYPES)}")
        dtype, (begin, stop) = _TYPES[self.dtype], self.data_offsets
        if dtype.itemsize * math.prod(self.shape) != stop - begin or begin < 0 or base + stop > size:
            raise ValueError("a column does not fit in it")
        if begin == stop:
            return np.empty(self.shape, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=base + begin, shape=tuple(self.shape))


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
