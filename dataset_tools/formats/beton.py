"""FFCV's .beton, version 2, with the fields `image` (RGBImageField) and `label` (IntField).

    header · field descriptors · metadata [N] · zeros up to a page · pages of images · allocation table

Laid out as FFCV 1.0's DatasetWriter does it (ffcv/types.py, ffcv/writer.py), but JPEG bytes need not be encoded anew,
and samples lie in order. The stock ffcv.loader.Loader reads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import open_own, read_at, write_at
from dataset_tools.formats.output_format import OutputFormat, ReadBytes, SampleWriter
from dataset_tools.formats.records import RAW, SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest

VERSION = 2
MIN_PAGE_BYTES = 1 << 21
MAX_PAGE_BYTES = 1 << 31

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = ((2, b"image"), (1, b"label"))
"""(FFCV's type number, name)."""
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize

COPY_BYTES = 16 << 20
HASH_BLOCK_BYTES = 1 << 26
UNLIMITED_PAGE_BYTES = 1 << 23
"""FFCV's own page size, for images without a limit; a larger sample makes pages larger."""
SAMPLES_IN_DECODER = (3 + 2) * 256
"""(batches_ahead + 2) x batch size that FFCV's decoding memory is stated for; the former is its default."""
DECODE_LIMIT_BYTES = 4 << 30
DEFAULT_MAX_SIDE = math.isqrt((DECODE_LIMIT_BYTES - 1) // (SAMPLES_IN_DECODER * 3))
"""Pixels: with no side above this, FFCV's stock decoders stay under 4 GiB."""


class Beton(OutputFormat):
    """One .beton for each split."""

    title = "FFCV"
    extension = ".beton"
    lossless = RAW
    default_order = "source"
    default_max_side = DEFAULT_MAX_SIDE
    sample_overhead_bytes = 300  # row, record, name, tables
    hash_block_bytes = HASH_BLOCK_BYTES
    decodes_into_buffers = True

    def page_bytes(self, max_side: int | None) -> int:
        return page_bytes_for(3 * max_side * max_side) if max_side else UNLIMITED_PAGE_BYTES

    def writer(
        self, folder: Path, split: str, *, num_reserved: int, page_bytes: int | None, rows: RowFile, **_: Any
    ) -> BetonWriter:
        assert page_bytes is not None
        return BetonWriter(folder / f"{split}.beton", num_reserved=num_reserved, page_bytes=page_bytes, rows=rows)

    def settled_page_bytes(self, files: Sequence[Path]) -> int:
        return int(read_beton_head(files[0])["page_size"])

    def problems(self, folder: Path, manifest: SplitManifest, records: SampleRecords) -> Iterator[str]:
        name, page = manifest.image_files[0], manifest.page_bytes or 1
        with open(folder / name, "rb") as file:
            table_at = max(0, os.fstat(file.fileno()).st_size - len(records) * ALLOCATION.itemsize)
            header, fields = beton_head(len(records), page, table_at)
            if file.read(METADATA_START) != header.tobytes() + fields.tobytes():
                yield f"{name}: its header is not what the manifest says"
                return
            for rows, start in records.blocks():
                places = METADATA_START + start * METADATA.itemsize, table_at + start * ALLOCATION.itemsize
                tables = zip(("metadata", "allocation"), beton_tables(rows, start), places, strict=True)
                for what, expected, at in tables:
                    found = np.frombuffer(read_at(file.fileno(), expected.nbytes, at), dtype=expected.dtype)
                    for index in np.flatnonzero(found != expected).tolist():
                        yield f"{name}: the {what} of sample {start + index} is not what the records say"
                crossing = rows["offset"] // page != (rows["offset"] + np.maximum(rows["num_bytes"], 1) - 1) // page
                for index in np.flatnonzero(crossing).tolist():
                    yield f"{name}: sample {start + index} crosses the end of a page"


def decode_bytes(max_width: int, max_height: int) -> int:
    """What FFCV's stock decoders allocate: (batches ahead + 2) x batch x largest width x largest height x 3."""
    return SAMPLES_IN_DECODER * max_width * max_height * 3


def page_bytes_for(largest: int) -> int:
    """The page size for samples of up to `largest` bytes: a power of two, at least 2 MiB."""
    return max(MIN_PAGE_BYTES, 1 << max(0, largest - 1).bit_length())


def data_start(num_reserved: int, page_bytes: int) -> int:
    """Where the first page of images begins, with metadata reserved for `num_reserved` samples."""
    return -(-(METADATA_START + num_reserved * METADATA.itemsize) // page_bytes) * page_bytes


def place(sizes: NDArray[np.int64], end: int, page_bytes: int) -> tuple[NDArray[np.int64], int]:
    """Where samples of `sizes` bytes go when `end` is the first free byte: offsets int64 [M], and the new end.

    One behind the other; one that would cross the end of its page begins the next one.
    """
    offsets = np.empty(len(sizes), dtype=np.int64)
    for index, size in enumerate(sizes.tolist()):
        if end % page_bytes + size > page_bytes:
            end += -end % page_bytes
        offsets[index] = end
        end += size
    return offsets, end


class BetonWriter(SampleWriter):
    """Writes one .beton. A sample larger than a page makes `finish` lay the file out anew, with larger pages."""

    def __init__(self, path: Path, *, num_reserved: int, page_bytes: int, rows: RowFile | None = None) -> None:
        """`num_reserved`: how many samples there will be at most. `rows`: those that are there already.

        Raises ValueError if the file does not hold them.
        """
        self.path, self.num_reserved, self.page_bytes = path, num_reserved, page_bytes
        if rows:
            with suppress(ValueError):  # unless an earlier process finished it
                self.page_bytes = page_bytes = max(page_bytes, int(read_beton_head(path)["page_size"]))
        self._file = open_own(path, "r+b" if rows else "w+b", buffering=0)
        self._end = data_start(num_reserved, page_bytes)
        for block, _ in rows.blocks() if rows else ():
            _, self._end = place(block["num_bytes"], self._end, page_bytes)
        if rows and os.fstat(self._file.fileno()).st_size < self._end:
            raise ValueError(f"{path} is shorter than the journal says")
        os.ftruncate(self._file.fileno(), self._end)

    def write(self, rows: NDArray[np.void], read: ReadBytes) -> None:
        sources = rows["offset"].copy()
        rows["offset"], self._end = place(rows["num_bytes"], self._end, self.page_bytes)
        rows["shard"] = 0
        for source, target, size in _runs(sources, rows["offset"], rows["num_bytes"]):
            for start in range(0, size, COPY_BYTES):
                piece = read(source + start, min(COPY_BYTES, size - start))
                write_at(self._file.fileno(), piece, target + start)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def finish(self, rows: RowFile) -> list[Path]:
        largest = max((int(block["num_bytes"].max()) for block, _ in rows.blocks()), default=0)
        needed = page_bytes_for(largest)
        if needed > MAX_PAGE_BYTES:
            raise ValueError(f"a sample of {largest:,} bytes fits into no page of FFCV, whose largest is 2 GiB")
        # Offsets follow from the sizes. An earlier `finish` may have left those of larger pages in the rows.
        end = data_start(self.num_reserved, self.page_bytes)
        for block, start in rows.blocks():
            block["offset"], end = place(block["num_bytes"], end, self.page_bytes)
            rows.replace(start, block)
        if needed > self.page_bytes:
            self._finish_with_larger_pages(rows, needed)
        else:
            self._write_tables(rows)
        return [self.path]

    def _finish_with_larger_pages(self, rows: RowFile, page_bytes: int) -> None:
        """A copy with larger pages takes the file's place, once it is whole."""
        path = self.path.with_name(f"{self.path.name}.larger")
        with closing(BetonWriter(path, num_reserved=self.num_reserved, page_bytes=page_bytes)) as writer:
            for block, start in rows.blocks():
                writer.write(block, lambda offset, size: read_at(self._file.fileno(), size, offset))
                rows.replace(start, block)
            writer._write_tables(rows)
        os.replace(path, self.path)

    def _write_tables(self, rows: RowFile) -> None:
        descriptor = self._file.fileno()
        header, fields = beton_head(len(rows), self.page_bytes, self._end + -self._end % self.page_bytes)
        write_at(descriptor, header.tobytes() + fields.tobytes(), 0)
        end = int(header["alloc_table_ptr"])
        for block, start in rows.blocks():
            metadata, allocations = beton_tables(block, start)
            write_at(descriptor, metadata.tobytes(), METADATA_START + start * METADATA.itemsize)
            write_at(descriptor, allocations.tobytes(), end)
            end += allocations.nbytes
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)

    def close(self) -> None:
        self._file.close()


def beton_head(num_samples: int, page_bytes: int, allocations_at: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The header (HEADER, no dimension) and the field descriptors (FIELD [2])."""
    header = np.zeros((), dtype=HEADER)
    header["version"], header["num_fields"], header["num_samples"] = VERSION, len(FIELDS), num_samples
    header["page_size"], header["alloc_table_ptr"] = page_bytes, allocations_at
    fields = np.zeros(len(FIELDS), dtype=FIELD)
    for entry, (type_id, name) in zip(fields, FIELDS, strict=True):
        entry["type_id"] = type_id
        entry["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
    return header, fields


def read_beton_head(path: Path) -> np.void:
    """The header (HEADER). Raises ValueError if the file is none of ours."""
    with open(path, "rb") as file:
        head = file.read(METADATA_START)
    if len(head) == METADATA_START:
        header = np.frombuffer(head, dtype=HEADER, count=1)[0]
        count, page_bytes, allocations_at = (int(header[n]) for n in ("num_samples", "page_size", "alloc_table_ptr"))
        expected, fields = beton_head(count, page_bytes, allocations_at)
        if head == expected.tobytes() + fields.tobytes():
            return header
    raise ValueError(f"{path} is no .beton, version {VERSION}, with the fields image and label")


def beton_tables(rows: NDArray[np.void], first_id: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The metadata (METADATA [M]) and the allocation table (ALLOCATION [M]) of samples, the first being `first_id`."""
    metadata = np.zeros(len(rows), dtype=METADATA)
    metadata["f0"]["mode"], metadata["f1"] = rows["encoding"], rows["label"]
    metadata["f0"]["width"], metadata["f0"]["height"] = rows["width"], rows["height"]
    metadata["f0"]["data_ptr"] = rows["offset"]
    allocations = np.zeros(len(rows), dtype=ALLOCATION)
    allocations["sample_id"] = np.arange(first_id, first_id + len(rows))
    allocations["ptr"], allocations["size"] = rows["offset"], rows["num_bytes"]
    return metadata, allocations


def _runs(
    sources: NDArray[np.int64], targets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """(source, target, size) of stretches that can be copied in one piece."""
    if not len(sizes):
        return
    broken = (sources[1:] != sources[:-1] + sizes[:-1]) | (targets[1:] != targets[:-1] + sizes[:-1])
    starts = np.concatenate(([0], np.flatnonzero(broken) + 1))
    totals = np.add.reduceat(sizes, starts)
    yield from zip(sources[starts].tolist(), targets[starts].tolist(), totals.tolist(), strict=True)
