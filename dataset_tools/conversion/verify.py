"""Whether a converted data set is whole: its files, every sample in them, and where it came from."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.conversion.hashing import file_problems
from dataset_tools.conversion.transform import UnusableImageError, decode
from dataset_tools.conversion.workers import WorkerPool, settled_workers
from dataset_tools.files import raise_if_of_machine, read_file
from dataset_tools.formats.manifest import MANIFEST_NAME, Manifest, read_quarantine
from dataset_tools.formats.records import HASH_BYTES, PASSED_THROUGH, SampleRecords
from dataset_tools.formats.split_manifest import FileEntry, SplitManifest
from dataset_tools.progress import progress
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.converted import ConvertedSplit, open_split
from dataset_tools.stop_signals import StopSignals, stop_signals

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 1000
"""Problems beyond this number are counted, not named."""
CHUNK_SAMPLES = 256


def verify(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    deep: bool = False,
    workers: int | None = None,
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
    with stop_signals() as stop:
        logger.info("%s: hashing the files", place)
        found = _Verification(place, manifest, original, deep, num_workers, stop).problems()
        problems = list(islice(found, MAX_PROBLEMS))
        num_problems = len(problems) + sum(1 for _ in found)
    samples = sum(split.samples for split in manifest.splits.values())
    return {"ok": not num_problems, "num_problems": num_problems, "problems": problems, "samples": samples}


@dataclass(frozen=True, slots=True)
class _Verification:
    folder: Path
    manifest: Manifest
    original: dict[str, Split] | None
    deep: bool
    num_workers: int
    stop: StopSignals

    def problems(self) -> Iterator[str]:
        """A sentence for each."""
        yield from self._unknown_files_and_splits()
        yield from self._file_problems(self.manifest.quarantine)
        for name, entry in self.manifest.splits.items():
            yield from self._split_problems(name, entry)

    def _unknown_files_and_splits(self) -> Iterator[str]:
        known = {MANIFEST_NAME, *(file.name for file in self.manifest.all_files)}
        for name in sorted(set(os.listdir(self.folder)) - known):
            logger.warning("%s is not in the manifest", name)
        if self.original is None:
            return
        if unknown := sorted(self.manifest.splits.keys() - self.original.keys()):
            yield f"the source has no split {', '.join(unknown)}"
        if self.manifest.options.get("split", "") is None:  # all were converted
            for name in sorted(self.original.keys() - self.manifest.splits.keys()):
                yield f"{name}: the source has {len(self.original[name]):,} images, here are none"

    def _split_problems(self, name: str, entry: SplitManifest) -> Iterator[str]:
        if problems := list(self._file_problems(entry.records)):
            yield from problems
            yield f"{entry.records.name}: the samples of {name} are not checked, since their records are damaged"
            return
        yield from self._file_problems(*entry.files)
        if any(not (self.folder / file.name).is_file() for file in entry.files):
            return
        try:
            split = open_split(self.folder, self.manifest, name)
            split.records.check(entry.image_bytes, len(self.manifest.classes))
        except ValueError as error:
            yield str(error)
            return
        original = self.original.get(name) if self.original is not None else None
        yield from split.output.problems(self.folder, entry, split.records)
        yield from self._sample_problems(split, original)
        if original is not None:
            yield from self._coverage_problems(name, split.records, original)

    def _file_problems(self, *files: FileEntry) -> Iterator[str]:
        for name, problem in file_problems(self.folder, files, self.num_workers, self.stop):
            yield f"{name}: {problem}"

    def _sample_problems(self, split: ConvertedSplit, original: Split | None) -> Iterator[str]:
        def work(samples: tuple[int, int]) -> tuple[list[str], list[bytes]]:
            rows = zip(range(*samples), split.records.rows(*samples), strict=True)
            return [
                f"{split.names[index]}: {problem}"
                for index, row in rows
                for problem in self._problems_of_sample(split, index, row, original)
            ], []

        pool = WorkerPool(
            work,
            self.num_workers,
            pieces=lambda samples: [(index, index + 1) for index in range(*samples)],
            crashed=lambda samples, reason: [f"{split.names[samples[0]]}: {reason}"],
            describe=lambda samples: split.names[samples[0]],
        )
        with pool, progress(split.name, len(split)) as advance:
            starts = range(0, len(split), CHUNK_SAMPLES)
            for done in pool.map((start, min(start + CHUNK_SAMPLES, len(split))) for start in starts):
                self.stop.raise_if_requested()
                if done is not None:
                    advance(done.task[1] - done.task[0])
                    yield from done.result

    def _problems_of_sample(
        self, split: ConvertedSplit, index: int, row: np.void, original: Split | None
    ) -> Iterator[str]:
        try:
            data = split.read_stored(index)
        except OSError as error:
            raise_if_of_machine(error)
            yield str(error)
            return
        if hashlib.sha256(data).digest()[:HASH_BYTES] != row["hash"].tobytes():
            yield "its bytes are not those that were written"
            return
        try:
            yield from split.output.sample_problems(split.files[int(row["shard"])], row)
        except OSError as error:
            raise_if_of_machine(error)
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
                if original.read_checked(source_index) != data:
                    yield "its bytes are not those of the source"
            except OSError as error:
                raise_if_of_machine(error)
                yield f"the source cannot be read: {error}"

    def _coverage_problems(self, name: str, records: SampleRecords, original: Split) -> Iterator[str]:
        """Whether the source has images that are neither here nor in quarantine."""
        present = np.unique(records["source_index"])
        if len(present) != len(records):
            yield f"{name}: {len(records) - len(present)} images of the source are here more than once"
        if self.manifest.part is None:
            known = np.union1d(present, self._quarantined(name))
            for index in np.setdiff1d(np.arange(len(original)), known).tolist():
                yield f"{original.names[index]}: the source has it; here it is neither a sample nor in quarantine"

    def _quarantined(self, name: str) -> NDArray[np.int64]:
        """The indices of a split's images that are in quarantine."""
        try:
            entries = read_quarantine(read_file(self.folder / self.manifest.quarantine.name))
            return np.array([entry.index for entry in entries if entry.split == name], dtype=np.int64)
        except (OSError, ValueError):  # reported as a damaged file
            return np.zeros(0, dtype=np.int64)
