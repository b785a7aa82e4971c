"""WebDataset: numbered tars of numbered samples, NNNNNNNNN.jpg (or .png) and NNNNNNNNN.cls, and DALI's index of each.

A key is the sample's position in the order of the whole split, so that names with dots, spaces or doubles do no harm.
The index is version 1.2 of what `wds2idx` writes for DALI's `fn.readers.webdataset`.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import ByteFile, open_own, write_file, write_pieces
from dataset_tools.formats.output_format import OutputFormat, ReadBytes, SampleWriter
from dataset_tools.formats.records import EXTENSIONS, PNG, SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest

BLOCK = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK
MAX_MEMBER_BYTES = 8**11 - 1
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_NAME_BYTES, _SIZE_AT, _CHECKSUM_AT = 100, 124, 148
_MODE_AND_OWNER = _EMPTY[_NAME_BYTES:_SIZE_AT]
_AFTER_SIZE = _EMPTY[_SIZE_AT + 11 : _CHECKSUM_AT]
_AFTER_CHECKSUM = _EMPTY[_CHECKSUM_AT + 7 :]
_EMPTY_CHECKSUM = int(_EMPTY[_CHECKSUM_AT : _CHECKSUM_AT + 6], 8) - 11 * ord("0")
"""The checksum of a header without name and without the digits of a size."""
INDEX_VERSION = "v1.2"


class TarShards(OutputFormat):
    """Numbered tars for each split, with the .idx files of DALI."""

    title = "WebDataset"
    extension = ".tar"
    lossless = PNG
    default_order = "shuffled"
    sample_overhead_bytes = 2400  # row, record, name, tar headers and padding, line of the index
    has_shards = True

    def writer(self, folder: Path, split: str, *, shard_bytes: int, rows: RowFile, **_: Any) -> ShardWriter:
        return ShardWriter(folder, split, shard_bytes=shard_bytes, rows=rows)

    def file_names(self, split: str, num_files: int) -> list[str]:
        """Each tar is followed by its index."""
        tars = [Path(shard_name(split, number)) for number in range(max(1, (num_files + 1) // 2))]
        return [path.with_suffix(suffix).name for path in tars for suffix in (".tar", ".idx")]

    def problems(self, folder: Path, manifest: SplitManifest, records: SampleRecords) -> Iterator[str]:
        for shard, expected in _index_files(records.blocks()):
            name = Path(manifest.image_files[shard]).with_suffix(".idx").name
            if (folder / name).read_text(errors="replace") != expected:
                yield f"{name}: it is not the index of the samples in its tar"

    def sample_problems(self, file: ByteFile, row: np.void) -> Iterator[str]:
        offset, size = int(row["offset"]), int(row["num_bytes"])
        image, label_name, text = sample_members(row)
        if file.read(offset - BLOCK, BLOCK, sample=image) != member_header(image, size):
            yield f"the tar header before {image} is damaged"
        if label_name:
            expected = member_header(label_name, len(text)) + text
            if file.read(offset + size + -size % BLOCK, len(expected), sample=label_name) != expected:
                yield f"{label_name} is damaged"


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


def sample_members(row: np.void) -> tuple[str, str | None, bytes]:
    """The names of a sample's members, image and label (None where there is none), and the label's text."""
    position, label = int(row["position"]), int(row["label"])
    image = f"{position:09}.{EXTENSIONS[int(row['encoding'])]}"
    if label < 0:
        return image, None, b""
    return image, f"{position:09}.cls", str(label).encode()


def _end_of(row: np.void) -> int:
    """Where a sample ends in its tar."""
    _, label_name, text = sample_members(row)
    image_bytes = int(row["num_bytes"])
    label_bytes = BLOCK + len(text) + -len(text) % BLOCK if label_name else 0
    return int(row["offset"]) + image_bytes + -image_bytes % BLOCK + label_bytes


class ShardWriter(SampleWriter):
    """Writes SPLIT-000000.tar, SPLIT-000001.tar … into a folder, each of at most `shard_bytes` (but of one sample)."""

    def __init__(self, folder: Path, split: str, *, shard_bytes: int, rows: RowFile) -> None:
        """`rows`: the samples that are there already. Raises OSError or ValueError if the tars do not hold them."""
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        ends = [0]
        for block, _ in rows.blocks():
            for row in block[np.flatnonzero(np.append(np.diff(block["shard"]), 1))]:  # the last ones of their tars
                ends[int(row["shard"]) :] = [_end_of(row)]
        *sizes, self._end = ends
        self._sizes = [end + END_BYTES for end in sizes]
        for number, size in enumerate(self._sizes):
            if self._path(number).stat().st_size != size:
                raise ValueError(f"{self._path(number)} has another size than the journal says")
        path = self._path(self._shard)
        self._file = open_own(path, "r+b" if rows else "w+b", buffering=0)
        if os.fstat(self._file.fileno()).st_size < self._end:
            raise ValueError(f"{path} is shorter than the journal says")
        os.ftruncate(self._file.fileno(), self._end)
        self._file.seek(self._end)

    def write(self, rows: NDArray[np.void], read: ReadBytes) -> None:
        pieces: list[memoryview | bytes] = []
        for row in rows:
            image, label_name, text = sample_members(row)
            members: list[tuple[str, memoryview | bytes]] = [(image, read(int(row["offset"]), int(row["num_bytes"])))]
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

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def finish(self, rows: RowFile) -> list[Path]:
        self._close_shard()
        files: list[Path] = []
        for number, text in _index_files(rows.blocks()):
            path = self._path(number)
            index = path.with_suffix(".idx")
            write_file(index, text)
            files += [path, index]
        return files

    def close(self) -> None:
        self._file.close()

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
        self._file = open_own(self._path(self._shard), "w+b", buffering=0)


def index_line(row: np.void) -> str:
    """A sample's line of a .idx: for each member its extension, offset and size in bytes, and name."""
    offset, size = int(row["offset"]), int(row["num_bytes"])
    image, label_name, text = sample_members(row)
    line = f"{EXTENSIONS[int(row['encoding'])]} {offset} {size} {image}"
    if label_name:
        line += f" cls {offset + size + -size % BLOCK + BLOCK} {len(text)} {label_name}"
    return line + "\n"


def _index_files(blocks: Iterable[tuple[NDArray[np.void], int]]) -> Iterator[tuple[int, str]]:
    """(number of a shard, content of its .idx), in order."""
    rows = (row for block, _ in blocks for row in block)
    for shard, of_shard in groupby(rows, key=lambda row: int(row["shard"])):
        lines = [index_line(row) for row in of_shard]
        yield shard, "".join([f"{INDEX_VERSION} {len(lines)}\n", *lines])


def parse_bytes(text: str) -> int:
    """ "256MiB", "1GB", "1.5 GiB" or a number of bytes → bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is no size; write for example 256MiB, 1GB or a number of bytes")
    number, prefix, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** (" kmgt".index(prefix) if prefix else 0)
    if size > 2**60:
        raise ValueError(f"{text[:40]!r} is not allowed as a size: give at most 1048576TiB")
    return int(size)
