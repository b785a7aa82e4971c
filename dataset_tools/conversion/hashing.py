"""The SHA-256 of many files at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_tools.conversion.staging import final_name
from dataset_tools.conversion.workers import WorkerPool
from dataset_tools.formats.manifest import FileEntry
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals

STALL_S = 24 * 3600.0
"""A file of hundreds of GB takes its time."""


def hash_files(
    files: Sequence[Path], num_workers: int, stop: StopSignals, descriptors: Callable[[], list[int]] = list
) -> list[FileEntry]:
    """One entry for each file, in order, under its final name, by worker processes that keep no `descriptors` open.

    Raises StoppedBySignalError if `stop` asks for the end.
    """

    def work(number: int) -> tuple[FileEntry, list[bytes]]:
        return FileEntry.of(files[number], final_name(files[number].name)), []

    entries = []
    with WorkerPool(
        work,
        min(num_workers, len(files)),
        describe=lambda number: f"the hashing of {files[number]}",
        descriptors=descriptors,
        stall_s=STALL_S,
    ) as pool:
        for done in pool.map(range(len(files))):
            if stop.requested:
                raise StoppedBySignalError(f"stopped by {stop.name}; the same command continues")
            if done is not None:
                entries.append(done.result)
    return entries
