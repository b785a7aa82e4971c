"""Whether a converted data set is whole: its files, every sample in them, and where it came from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.progress import Progress
from dataset_tools.conversion.treatment import UnusableImageError, decode
from dataset_tools.conversion.workers import WorkerPool, settled_workers
from dataset_tools.file_io import read_at
from dataset_tools.formats.beton import (
    ALLOCATION,
    METADATA,
    METADATA_START,
    beton_head,
    beton_tables,
)
from dataset_tools.formats.manifest import MANIFEST_NAME, FileEntry, Manifest, SplitManifest
from dataset_tools.formats.records import BLOCK_ROWS, HASH_BYTES, PASSED_THROUGH, SampleRecords
from dataset_tools.formats.tar_shards import BLOCK, index_line, member_header, sample_members
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.byte_file import ByteFile
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals, stop_signals

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 1000
"""More are counted, not named."""
CHUNK_SAMPLES = 256


def verify(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    deep: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Checks the converted data set `folder`.

    Always: that the manifest's files are there, with their sizes and SHA-256; that headers, tables and indices say what
    the records say; that each sample's bytes have its hash. `deep`: that each image can be decoded and has the size it
    should. `source`: that the samples are those of `source` (anything that open_source takes), with their names and
    labels, and the same bytes where they were passed through.

    Returns `ok`, `problems` (at most 1000, each a sentence that names the file or the sample), `num_problems`,
    `samples`. Raises FileNotFoundError or ValueError if there is no manifest to begin with, or no such source.
    """
    num_workers = settled_workers(workers)
    place = Path(folder).expanduser()
    manifest = Manifest.load(place)
    original = open_source(source).splits if source is not None else None
    with stop_signals(enabled=True) as stop, progress or Progress() as shown:
        shown.say(f"{place}: hashing the files")
        checks = _Verification(place, manifest, original, deep, num_workers, shown, stop)
        problems = list(islice(found := checks.problems(), MAX_PROBLEMS))
        num_problems = len(problems) + sum(1 for _ in found)
    samples = sum(split.samples for split in manifest.splits.values())
    return {"ok": not num_problems, "num_problems": num_problems, "problems": problems, "samples": samples}


class _Verification:
    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        original: dict[str, Split] | None,
        deep: bool,
        num_workers: int,
        progress: Progress,
        stop: StopSignals,
    ) -> None:
        self.folder, self.manifest, self.original, self.deep = folder, manifest, original, deep
        self.num_workers, self.progress, self.stop = num_workers, progress, stop

    def problems(self) -> Iterator[str]:
        """A sentence for each."""
        yield from self._strangers()
        yield from self._file_problems([self.manifest.quarantine])
        for name, entry in self.manifest.splits.items():
            yield from self._split_problems(name, entry)

    def _split_problems(self, name: str, entry: SplitManifest) -> Iterator[str]:
        if problems := list(self._file_problems([entry.records])):
            yield from problems
            yield f"{entry.records.name}: the samples of {name} are not checked, since their records are damaged"
            return
        yield from self._file_problems(entry.files)
        if any(not (self.folder / file.name).is_file() for file in entry.files):
            return
        try:
            records = SampleRecords.open(self.folder / entry.records.name)
        except ValueError as error:
            yield str(error)
            return
        if self.manifest.format == "ffcv":
            yield from self._beton_problems(entry, records)
        else:
            yield from self._index_problems(entry, records)
        yield from self._sample_problems(name, entry, records)
        if self.original is not None:
            yield from self._coverage_problems(name, entry, records)

    def _strangers(self) -> Iterator[str]:
        known = {MANIFEST_NAME, *(file.name for file in self.manifest.all_files)}
        for name in sorted(set(os.listdir(self.folder)) - known):
            logger.warning("%s is not in the manifest", name)
        if self.original is not None and (unknown := sorted(self.manifest.splits.keys() - self.original.keys())):
            yield f"the source has no split {', '.join(unknown)}"
        if self.original is not None and self.manifest.options.get("split", "") is None:  # all were converted
            for name in sorted(self.original.keys() - self.manifest.splits.keys()):
                yield f"{name}: the source has {len(self.original[name]):,} images, here are none"

    def _file_problems(self, files: Sequence[FileEntry]) -> Iterator[str]:
        """Whether files are there, and as they were written."""
        there = []
        for file in files:
            if (self.folder / file.name).is_file():
                there.append(file)
            else:
                yield f"{file.name}: it is missing"
        found = hash_files([self.folder / file.name for file in there], self.num_workers, self.stop)
        for expected, now in zip(there, found, strict=True):
            if now.bytes != expected.bytes:
                yield f"{expected.name}: it has {now.bytes:,} bytes and not {expected.bytes:,}"
            elif now.sha256 != expected.sha256:
                yield f"{expected.name}: its SHA-256 is {now.sha256[:16]}… and not {expected.sha256[:16]}…"

    def _beton_problems(self, entry: SplitManifest, records: SampleRecords) -> Iterator[str]:
        name = entry.image_files[0]
        with open(self.folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            table_at = size - len(records) * ALLOCATION.itemsize
            header, fields = beton_head(len(records), entry.page_bytes or 0, max(table_at, 0))
            head = header.tobytes() + fields.tobytes()
            if size < METADATA_START or read_at(file.fileno(), METADATA_START, 0) != head:
                yield f"{name}: its header is not what the manifest says"
                return
            for start in range(0, len(records), BLOCK_ROWS):
                rows = records.rows(start, start + BLOCK_ROWS)
                metadata, allocations = beton_tables(rows, start)
                metadata_at = METADATA_START + start * METADATA.itemsize
                allocations_at = table_at + start * ALLOCATION.itemsize
                for what, expected, at in (
                    ("metadata", metadata, metadata_at),
                    ("allocation", allocations, allocations_at),
                ):
                    found = np.frombuffer(read_at(file.fileno(), expected.nbytes, at), dtype=expected.dtype)
                    for index in np.flatnonzero(found != expected).tolist():
                        yield f"{name}: the {what} of sample {start + index} is not what the records say"
                page = entry.page_bytes or 1
                crossing = rows["offset"] // page != (rows["offset"] + np.maximum(rows["num_bytes"], 1) - 1) // page
                for index in np.flatnonzero(crossing).tolist():
                    yield f"{name}: sample {start + index} crosses the end of a page"

    def _index_problems(self, entry: SplitManifest, records: SampleRecords) -> Iterator[str]:
        lines: dict[int, list[str]] = {}
        for start in range(0, len(records), BLOCK_ROWS):
            for row in records.rows(start, start + BLOCK_ROWS):
                lines.setdefault(int(row["shard"]), []).append(index_line(row))
            complete = sorted(lines)[:-1] if start + BLOCK_ROWS < len(records) else sorted(lines)
            for shard in complete:
                name = Path(entry.image_files[shard]).with_suffix(".idx").name
                expected = lines.pop(shard)
                if (self.folder / name).read_text(errors="replace") != f"v1.2 {len(expected)}\n" + "".join(expected):
                    yield f"{name}: it is not the index of the samples in its tar"

    def _sample_problems(self, name: str, entry: SplitManifest, records: SampleRecords) -> Iterator[str]:
        files = tuple(ByteFile(self.folder / file) for file in entry.image_files)
        split = ConvertedSplit(name, records, files, self.manifest.classes)
        original = self.original.get(name) if self.original is not None else None

        def work(samples: tuple[int, int]) -> tuple[list[str], list[bytes]]:
            rows = records.rows(*samples)
            return [
                f"{split.names[index]}: {problem}"
                for index, row in zip(range(*samples), rows, strict=True)
                for problem in self._problems_of_sample(split, index, row, original)
            ], []

        tasks = [(start, min(start + CHUNK_SAMPLES, len(split))) for start in range(0, len(split), CHUNK_SAMPLES)]
        self.progress.start(name, len(split), 0)
        counts = {
            "passed_through": entry.passed_through,
            "reencoded": entry.reencoded,
            "quarantined": entry.quarantined,
        }
        read_bytes = 0
        with WorkerPool(
            work,
            self.num_workers,
            pieces=lambda samples: [(index, index + 1) for index in range(*samples)],
            crashed=lambda samples, reason: [f"{split.names[samples[0]]}: {reason}"],
            describe=lambda samples: split.names[samples[0]],
        ) as pool:
            for done in pool.map(tasks):
                self._stop_if_asked()
                if done is not None:
                    read_bytes += int(records["num_bytes"][slice(*done.task)].sum())
                    self.progress.update(done.task[1], counts | {"bytes": read_bytes})
                    yield from done.result

    def _problems_of_sample(
        self, split: ConvertedSplit, index: int, row: np.void, original: Split | None
    ) -> Iterator[str]:
        try:
            data = split.read_stored(index)
        except OSError as error:
            yield str(error)
            return
        if _half_sha256(data) != row["hash"].tobytes():
            yield "its bytes are not those that were written"
            return
        if self.manifest.format == "webdataset":
            try:
                yield from _tar_problems(split, row, len(data))
            except OSError as error:
                yield str(error)
        if self.deep:
            try:
                decode(data, int(row["encoding"]), int(row["width"]), int(row["height"]))
            except UnusableImageError as error:
                yield f"it cannot be decoded: {error}"
        if original is None:
            return
        source_index = int(row["source_index"])
        if source_index >= len(original) or original.names[source_index] != split.names[index]:
            yield f"the source has another image, or none, at its index {source_index}"
            return
        if int(original.labels[source_index]) != int(row["label"]):
            yield f"its label is {int(row['label'])}, in the source {int(original.labels[source_index])}"
        if row["handling"] == PASSED_THROUGH:
            try:
                same = original.read(source_index) == data
            except OSError as error:
                yield f"the source cannot be read: {error}"
                return
            if not same:
                yield "its bytes are not those of the source"

    def _coverage_problems(self, name: str, entry: SplitManifest, records: SampleRecords) -> Iterator[str]:
        """Whether the source has images that are neither here nor in quarantine."""
        original = self.original.get(name) if self.original else None
        if original is None:
            return
        present = np.unique(records["source_index"])
        if len(present) != len(records):
            yield f"{name}: {len(records) - len(present)} images of the source are here more than once"
        if self.manifest.part is None:
            known = np.union1d(present, self._quarantined(name))
            missing = np.setdiff1d(np.arange(len(original)), known)
            for index in missing.tolist():
                yield f"{original.names[index]}: the source has it; here it is neither a sample nor in quarantine"

    def _quarantined(self, name: str) -> NDArray[np.int64]:
        """The indices of a split's images that are in quarantine."""
        path = self.folder / self.manifest.quarantine.name
        try:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return np.array([entry["index"] for entry in entries if entry["split"] == name], dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError):  # told as a damaged file
            return np.zeros(0, dtype=np.int64)

    def _stop_if_asked(self) -> None:
        if self.stop.requested:
            raise StoppedBySignalError(f"stopped by {self.stop.name}")


def _tar_problems(split: ConvertedSplit, row: np.void, size: int) -> Iterator[str]:
    file = split.files[int(row["shard"])]
    position, encoding, label = int(row["position"]), int(row["encoding"]), int(row["label"])
    image, label_name, text = sample_members(position, encoding, size, label)
    if file.read(int(row["offset"]) - BLOCK, BLOCK, sample=image) != member_header(image, size):
        yield f"the tar header before {image} is damaged"
    if label_name:
        begin = int(row["offset"]) + size + -size % BLOCK
        expected = member_header(label_name, len(text)) + text
        if file.read(begin, len(expected), sample=label_name) != expected:
            yield f"{label_name} is damaged"


def _half_sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH_BYTES]
