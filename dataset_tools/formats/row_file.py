"""The rows of a split while it is being written: a file, walked a block at a time, so that memory does not grow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import open_own, read_at, write_at, written
from dataset_tools.formats.records import BLOCK_ROWS, ROW, TYPE_NAMES
from dataset_tools.packed_names import PackedNames


class RowFile:
    """N rows (ROW). A kernel's page cache holds them, not this process."""

    def __init__(self, path: Path, count: int = 0) -> None:
        """The first `count` rows of what an earlier process wrote; with 0, a new file.

        Raises FileNotFoundError, or ValueError if it holds fewer.
        """
        self.path, self._count = path, count
        self._file = open_own(path, "r+b" if count else "w+b", buffering=0)
        if os.fstat(self._file.fileno()).st_size < count * ROW.itemsize:
            self._file.close()
            raise ValueError(f"{path} is shorter than the journal says")
        os.ftruncate(self._file.fileno(), count * ROW.itemsize)
        self._digest = hashlib.sha256()
        for block, _ in self.blocks():
            self._add_to_digest(block)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: NDArray[np.void]) -> None:
        self.replace(self._count, rows)
        self._count += len(rows)
        self._add_to_digest(rows.copy())

    def sha256(self) -> str:
        """Of all that was appended but the offsets, which follow from the sizes and may be replaced."""
        return self._digest.hexdigest()

    def _add_to_digest(self, rows: NDArray[np.void]) -> None:
        rows["offset"] = 0
        self._digest.update(rows.tobytes())

    def replace(self, start: int, rows: NDArray[np.void]) -> None:
        """Write `rows` over those from number `start` on."""
        write_at(self.fileno(), rows.tobytes(), start * ROW.itemsize)

    def blocks(self) -> Iterator[tuple[NDArray[np.void], int]]:
        """All rows, a block at a time, each a copy, with the number of its first row."""
        for start in range(0, self._count, BLOCK_ROWS):
            count = min(BLOCK_ROWS, self._count - start)
            data = read_at(self.fileno(), count * ROW.itemsize, start * ROW.itemsize)
            yield np.frombuffer(bytearray(data), dtype=ROW), start

    def write_records(self, path: Path, names: PackedNames, *, of_source: bool) -> None:
        """Writes the file that `SampleRecords` opens: these rows as columns, and their names; synced to the disk.

        `of_source`: `names` are those of all images of the source, else of the rows.
        """

        def blocks() -> Iterator[PackedNames]:
            for block, start in self.blocks():
                yield names.select(block["source_index"]) if of_source else names[start : start + len(block)]

        columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            name: (ROW[name].base, (len(self), *ROW[name].shape)) for name in ROW.names or ()
        }
        ends = np.cumsum([0, *(len(block.blob) for block in blocks())])
        columns |= {"name_ends": (np.dtype("<i8"), (len(self) + 1,)), "name_bytes": (np.dtype("u1"), (int(ends[-1]),))}
        # Wide types first: every column is then aligned.
        columns = dict(sorted(columns.items(), key=lambda item: -item[1][0].itemsize))
        with written(path) as file:
            file.write(_safetensors_header(columns))
            for name in columns:
                if name == "name_ends":
                    file.write(bytes(8))
                    for end, names_of in zip(ends.tolist(), blocks(), strict=False):
                        file.write((end + names_of.offsets[1:]).astype("<i8").data)
                elif name == "name_bytes":
                    file.writelines(names_of.blob for names_of in blocks())
                else:
                    file.writelines(np.ascontiguousarray(block[name]).data for block, _ in self.blocks())

    def sync(self) -> None:
        """Bring all to the disk."""
        os.fsync(self.fileno())

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def _safetensors_header(columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    """The header of columns of these types and shapes, which follow one behind the other."""
    layout, begin = {}, 0
    for name, (dtype, shape) in columns.items():
        stop = begin + dtype.itemsize * int(np.prod(shape))
        layout[name] = {"dtype": TYPE_NAMES[dtype.str], "shape": shape, "data_offsets": [begin, stop]}
        begin = stop
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
