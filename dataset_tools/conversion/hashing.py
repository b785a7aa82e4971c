"""The SHA-256 of many and large files, on all cores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataset_tools.formats.split_manifest import FileEntry
from dataset_tools.stop_signals import StopSignals

READ_BYTES = 1 << 20


def hash_files(files: Sequence[tuple[Path, int | None]], num_workers: int, stop: StopSignals) -> list[FileEntry]:
    """One entry for each (file, bytes of a block or None: see FileEntry), in order.

    Threads do it, since hashlib lets others run meanwhile. If `stop` asks for the end, raises StoppedBySignalError.
    """
    sizes = [path.stat().st_size for path, _ in files]
    with ThreadPoolExecutor(num_workers) as pool:
        digests = []
        for (path, block_bytes), size in zip(files, sizes, strict=True):
            step = block_bytes or max(1, size)
            digests.append([pool.submit(_sha256, path, start, step, stop) for start in range(0, max(1, size), step)])
    entries = []
    for (path, block_bytes), size, each in zip(files, sizes, digests, strict=True):
        found = [digest.result() for digest in each]
        sha256 = hashlib.sha256(b"".join(found)).digest() if block_bytes else found[0]
        entries.append(FileEntry(name=path.name, bytes=size, sha256=sha256.hex(), block_bytes=block_bytes))
    return entries


def _sha256(path: Path, start: int, num_bytes: int, stop: StopSignals) -> bytes:
    """Hashes `num_bytes` from `start` on, or to the end of the file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while num_bytes and (chunk := file.read(min(READ_BYTES, num_bytes))):
            stop.raise_if_requested()
            digest.update(chunk)
            num_bytes -= len(chunk)
    return digest.digest()


def file_problems(
    folder: Path, files: Sequence[FileEntry], num_workers: int, stop: StopSignals
) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) of each file that is not there as it was written."""
    there = []
    for file in files:
        if (folder / file.name).is_file():
            there.append(file)
        else:
            yield file.name, "it is missing"
    to_hash = [(folder / file.name, file.block_bytes) for file in there]
    for expected, now in zip(there, hash_files(to_hash, num_workers, stop), strict=True):
        if now.bytes != expected.bytes:
            yield expected.name, f"it has {now.bytes:,} bytes and not {expected.bytes:,}"
        elif now.sha256 != expected.sha256:
            yield expected.name, f"its SHA-256 is {now.sha256[:16]}… and not {expected.sha256[:16]}…"
