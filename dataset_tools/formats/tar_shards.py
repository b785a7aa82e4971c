"""WebDataset: numbered tars of numbered samples, NNNNNNNNN.jpg (or .png) and NNNNNNNNN.cls, and DALI's index of each.

A key is the sample's position in the order of the whole split, so that names with dots, spaces or doubles do no harm.
The index is version 1.2 of what `wds2idx` writes for DALI's `fn.readers.webdataset`.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.file_io import write_pieces
from dataset_tools.formats.records import EXTENSIONS
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.sample_writer import ReadBytes, SampleWriter

BLOCK = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK
MAX_MEMBER_BYTES = 8**11 - 1
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_NAME_BYTES, _SIZE_AT, _CHECKSUM_AT = 100, 124, 148
_MODE_AND_OWNER = _EMPTY[_NAME_BYTES:_SIZE_AT]
_AFTER_SIZE = _EMPTY[_SIZE_AT + 11 : _CHECKSUM_AT]
_AFTER_CHECKSUM = _EMPTY[_CHECKSUM_AT + 7 :]
_EMPTY_CHECKSUM = int(_EMPTY[_CHECKSUM_AT : _CHECKSUM_AT + 6], 8) - 11 * ord("0")
"""Of the header of a file without name and without the digits of its size."""
INDEX_VERSION = "v1.2"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06}.tar"


def member_header(name: str, size: int) -> bytes:
    """The tar header of a file, owned by nobody and of no date, so that the same samples make the same bytes.

    Equal to TarInfo.tobuf, in a tenth of its time: only name (ASCII, up to 99 bytes), size and checksum change.
    """
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; a tar takes up to {MAX_MEMBER_BYTES:,}")
    encoded, octal = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0" % (_EMPTY_CHECKSUM + sum(encoded) + sum(octal))
    padded = encoded + bytes(_SIZE_AT - len(_MODE_AND_OWNER) - len(encoded))
    return b"".join((padded, _MODE_AND_OWNER, octal, _AFTER_SIZE, checksum, _AFTER_CHECKSUM))


def sample_members(position: int, encoding: int, num_bytes: int, label: int) -> tuple[str, str | None, bytes]:
    """The names of a sample's members, image and label (None where there is none), and the label's text."""
    image = f"{position:09}.{EXTENSIONS[encoding]}"
    if label < 0:
        return image, None, b""
    return image, f"{position:09}.cls", str(label).encode()


class ShardWriter(SampleWriter):
    """Writes SPLIT-000000.tar, SPLIT-000001.tar … into a folder, each of at most `shard_bytes` (but of one sample)."""

    def __init__(self, folder: Path, split: str, *, shard_bytes: int, state: dict[str, Any] | None = None) -> None:
        """`state`: what `sync` returned, to continue. Raises FileNotFoundError or ValueError if the tars do not hold
        what it says.
        """
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self._sizes, self._end = (list(state["sizes"]), int(state["end"])) if state else ([], 0)
        for number, size in enumerate(self._sizes):
            if self._path(number).stat().st_size != size:
                raise ValueError(f"{self._path(number)} has another size than the journal says")
        path = self._path(self._shard)
        self._file = open(path, "r+b" if state else "w+b", buffering=0)  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_size < self._end:
            raise ValueError(f"{path} is shorter than the journal says")
        os.ftruncate(self._file.fileno(), self._end)
        self._file.seek(self._end)

    def write(self, rows: NDArray[np.void], read: ReadBytes) -> None:
        pieces: list[memoryview | bytes] = []
        for row in rows:
            size, label = int(row["num_bytes"]), int(row["label"])
            image, label_name, text = sample_members(int(row["position"]), int(row["encoding"]), size, label)
            members: list[tuple[str, memoryview | bytes]] = [(image, read(int(row["offset"]), size))]
            if label_name:
                members.append((label_name, text))
            total = sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in members)
            if self._end and self._end + total + END_BYTES > self.shard_bytes:
                self._flush(pieces)
                self._next_shard()
            row["offset"], row["shard"] = self._end + BLOCK, self._shard
            for name, data in members:
                pieces += [member_header(name, len(data)), data, bytes(-len(data) % BLOCK)]
            self._end += total
        self._flush(pieces)

    def sync(self) -> dict[str, Any]:
        os.fsync(self._file.fileno())
        return {"sizes": list(self._sizes), "end": self._end}

    def finish(self, rows: RowFile) -> list[Path]:
        self._close_shard()
        files: list[Path] = []
        for number, lines in _index_lines(rows):
            path = self._path(number)
            index = path.with_suffix(".idx")
            with open(index, "w", encoding="ascii") as file:
                file.write(f"{INDEX_VERSION} {len(lines)}\n")
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            files += [path, index]
        return files

    def close(self) -> None:
        self._file.close()

    def descriptors(self) -> list[int]:
        return [self._file.fileno()]

    @property
    def _shard(self) -> int:
        """The number of the tar that is being written: all before it are complete."""
        return len(self._sizes)

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(self.split, number)

    def _flush(self, pieces: list[memoryview | bytes]) -> None:
        write_pieces(self._file.fileno(), pieces)
        pieces.clear()

    def _close_shard(self) -> None:
        os.ftruncate(self._file.fileno(), self._end)  # an earlier `finish` may have been here
        self._file.seek(self._end)
        self._flush([bytes(END_BYTES)])
        os.fsync(self._file.fileno())

    def _next_shard(self) -> None:
        self._close_shard()
        self._file.close()
        self._sizes.append(self._end + END_BYTES)
        self._end = 0
        self._file = open(self._path(self._shard), "w+b", buffering=0)  # noqa: SIM115


def index_line(row: np.void) -> str:
    """A sample's line of a .idx: for each member its extension, offset and size in bytes, and name."""
    offset, size, label = int(row["offset"]), int(row["num_bytes"]), int(row["label"])
    image, label_name, text = sample_members(int(row["position"]), int(row["encoding"]), size, label)
    line = f"{EXTENSIONS[int(row['encoding'])]} {offset} {size} {image}"
    if label_name:
        line += f" cls {offset + size + -size % BLOCK + BLOCK} {len(text)} {label_name}"
    return line + "\n"


def _index_lines(rows: RowFile) -> Iterator[tuple[int, list[str]]]:
    """(number, lines) of each shard, in order."""
    current, lines = 0, list[str]()
    for block, _ in rows.blocks():
        for row in block:
            if row["shard"] != current:
                yield current, lines
                current, lines = int(row["shard"]), []
            lines.append(index_line(row))
    yield current, lines


def parse_bytes(text: str) -> int:
    """ "256MiB", "1GB", "1.5 GiB" or a number of bytes → bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is no size; write for example 256MiB, 1GB or a number of bytes")
    number, prefix, binary = match.groups()
    exponent = " kmgt".index(prefix) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)
