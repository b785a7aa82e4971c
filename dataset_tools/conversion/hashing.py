"""The SHA-256 of many and large files, on all cores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_tools.conversion.staging import final_name
from dataset_tools.conversion.workers import WorkerPool
from dataset_tools.formats.manifest import FileEntry
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals

BLOCK_BYTES = 1 << 26
"""Of the files that are hashed in blocks."""
READ_BYTES = 1 << 20
STALL_S = 24 * 3600.0
"""A file of hundreds of GB, on a slow disk, takes its time."""


def hash_files(
    files: Sequence[Path], num_workers: int, stop: StopSignals, descriptors: Callable[[], list[int]] = list
) -> list[FileEntry]:
    """One entry for each file, in order, under its final name, by worker processes that keep no `descriptors` open.

    Raises StoppedBySignalError if `stop` asks for the end.
    """
    names = [final_name(path.name) for path in files]
    block_bytes = [BLOCK_BYTES if name.endswith(".beton") else None for name in names]
    sizes = [path.stat().st_size for path in files]

    def work(task: tuple[int, int]) -> tuple[bytes, list[bytes]]:
        number, start = task
        return _sha256(files[number], start, block_bytes[number]), []

    tasks = []
    for number, size in enumerate(sizes):
        whole = max(1, size)
        tasks += [(number, start) for start in range(0, whole, block_bytes[number] or whole)]
    digests: list[list[bytes]] = [[] for _ in files]
    with WorkerPool(
        work,
        min(num_workers, max(1, len(tasks))),
        describe=lambda task: f"the hashing of {files[task[0]]}",
        descriptors=descriptors,
        stall_s=STALL_S,
    ) as pool:
        for done in pool.map(tasks):
            if stop.requested:
                raise StoppedBySignalError(f"stopped by {stop.name}; the same command continues")
            if done is not None:
                digests[done.task[0]].append(done.result)
    return [
        FileEntry(name=name, bytes=size, sha256=_combined(each, block).hex(), block_bytes=block)
        for name, size, each, block in zip(names, sizes, digests, block_bytes, strict=True)
    ]


def _combined(digests: list[bytes], block_bytes: int | None) -> bytes:
    return hashlib.sha256(b"".join(digests)).digest() if block_bytes else digests[0]


def _sha256(path: Path, start: int, num_bytes: int | None) -> bytes:
    """Of `num_bytes` (None: all) from `start` on, or to the end of the file."""
    digest, left = hashlib.sha256(), num_bytes
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left != 0 and (chunk := file.read(READ_BYTES if left is None else min(READ_BYTES, left))):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.digest()
