"""The cache folder: what is compressed is unpacked into it once; indices of large tars are kept there."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import hashlib
import logging
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

from dataset_tools.files import open_own, open_regular, write_file
from dataset_tools.sources.tar_index import DamagedArchiveError, TarIndex

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
SPARE_BYTES = 256 << 20
"""So much is left free on the disk of the cache folder."""
CHECKED_BYTES = 2 << 30
"""What was unpacked is compared with its checksum when it is opened, up to this size: about a second."""
MAX_RATIO, RATIO_FROM_BYTES = 200, 256 << 20
"""What becomes so many times as large, and so large, holds no images: these are compressed already."""
INDEX_VERSION = 3
INDEX_KEPT_FROM = 10_000
"""Images in a plain tar from which on its index is kept: reading the headers takes a quarter of a second."""

DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""First bytes of a file → what opens it."""


def cache_folder() -> Path:
    """$LEOCLR_CACHE, else $XDG_CACHE_HOME/leoclr-fast, else ~/.cache/leoclr-fast. It may be deleted at any
    time.
    """
    if chosen := os.environ.get("LEOCLR_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "leoclr-fast"
    try:
        return Path.home() / ".cache" / "leoclr-fast"
    except RuntimeError:  # a user without a home
        return _own_folder(Path(tempfile.gettempdir()) / f"leoclr-fast-{os.getuid()}")


@cache
def _own_folder(folder: Path) -> Path:
    """`folder`, in a place where others write too, if it is this user's alone; else a fresh one beside it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))


def compression(head: bytes) -> bytes | None:
    """The key of DECOMPRESSORS for a file that begins with `head`."""
    return next((magic for magic in DECOMPRESSORS if head.startswith(magic)), None)


def plain_tar(archive: Path) -> tuple[Path, TarIndex]:
    """The uncompressed tar, which is `archive` itself or its copy in the cache folder, and its index.

    One process unpacks, others wait for it. The copy appears whole or not at all, and is found again by path,
    size and modification time. Raises DamagedArchiveError if the archive is unusable, OSError if there is no
    room for the copy.
    """
    with open_regular(archive) as file:
        magic = compression(file.read(16))
    entry = cache_entry([archive], ".tar")
    kept_index = entry.with_name(f"{entry.name}.{INDEX_VERSION}.npz")
    if magic is None:
        if (index := _load(kept_index)) is None:
            index = TarIndex.build(archive)
            if len(index.names) >= INDEX_KEPT_FROM:
                with suppress(OSError), alone(entry):
                    index.save(kept_index)
        return archive, index
    with alone(entry):
        if is_intact(entry) and (index := _load(kept_index)) is not None:
            return entry, index
        partial = entry.with_name(entry.name + ".partial")
        try:
            crc32 = _unpack(archive, magic, partial)
            index = TarIndex.build(partial)
            if not len(index.names):
                return archive, index  # nothing to keep
            index.save(kept_index)
            keep_checksum(entry, crc32)
            os.replace(partial, entry)
        finally:
            partial.unlink(missing_ok=True)
    return entry, index


def keep_checksum(entry: Path, crc32: int) -> None:
    """Keeps beside a cache entry what `is_intact` compares it with."""
    write_file(entry.with_name(entry.name + ".crc32"), f"{crc32}\n")


def is_intact(entry: Path) -> bool:
    """Whether a cache entry is there and, unless it is larger than CHECKED_BYTES, has the bytes that were unpacked."""
    try:
        status = entry.stat()
        expected = entry.with_name(entry.name + ".crc32").read_text()
        found = _crc32(entry, status.st_size, status.st_ctime_ns) if status.st_size <= CHECKED_BYTES else None
    except FileNotFoundError:
        return False
    if found is not None and f"{found}\n" != expected:
        logger.warning("%s has changed since it was unpacked, and is made again", entry)
        return False
    return True


@cache
def _crc32(entry: Path, _size: int, _ctime_ns: int) -> int:
    crc32 = 0
    with open_regular(entry) as file:
        while chunk := file.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def cache_entry(files: Sequence[Path], suffix: str, version: str = "") -> Path:
    """Where the cache folder keeps what is made of `files` (one at least): a name that changes with the path,
    size or modification time of any of them, and with `version`, which is that of the format.
    """
    identity = [version] if version else []
    for file in files:
        status = file.stat()
        identity.append(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}")
    digest = hashlib.sha256("\0".join(identity).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / f"{files[0].name.split('.')[0]}-{digest[:16]}{suffix}"


def _load(kept_index: Path) -> TarIndex | None:
    try:
        return TarIndex.load(kept_index)
    except OSError:
        return None
    except (EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        logger.warning("the index %s cannot be read (%s) and is made again", kept_index, error)
        return None


@contextmanager
def alone(entry: Path) -> Iterator[None]:
    """Holds the lock of a cache entry."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = open_own(entry.with_name(entry.name + ".lock"), "a+b")
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache folder {entry.parent} cannot be written ({error.strerror}); set LEOCLR_CACHE to another one",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(archive: Path, magic: bytes, target: Path) -> int:
    logger.info("unpacking %s once, into %s", archive, target.parent)
    with open_regular(archive) as file, DECOMPRESSORS[magic](file, "rb") as packed:
        return write_chunks(_chunks(packed), target, f"unpack {archive}", archive.stat().st_size)


def write_chunks(chunks: Iterable[bytes], target: Path, purpose: str, packed_bytes: int) -> int:
    """Writes `chunks`, which come out of `packed_bytes`, and returns their CRC-32.

    Raises OSError if less than SPARE_BYTES would be left, DamagedArchiveError if they become more than any images do.
    """
    crc32, limit = 0, max(RATIO_FROM_BYTES, MAX_RATIO * packed_bytes)
    with open_own(target, "w+b") as output:
        for chunk in chunks:
            if output.tell() + len(chunk) > limit:
                raise DamagedArchiveError(f"it becomes more than {MAX_RATIO} times as large, as no images do")
            check_room(target.parent, len(chunk), purpose, written_bytes=output.tell())
            output.write(chunk)
            crc32 = zlib.crc32(chunk, crc32)
        output.flush()
        os.fsync(output.fileno())
    return crc32


def check_room(folder: Path, needed_bytes: int, purpose: str, written_bytes: int = 0) -> None:
    """Raises OSError, saying what for (`purpose`), if `folder` has no room for that and SPARE_BYTES."""
    if shutil.disk_usage(folder).free < SPARE_BYTES + needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"no room to {purpose}: {folder} has less than {(SPARE_BYTES + needed_bytes) >> 20} MiB left after "
            f"{written_bytes / 2**30:.1f} GiB; free some, or set LEOCLR_CACHE to a folder on a larger disk",
        )


def _chunks(packed: IO[bytes]) -> Iterator[bytes]:
    """Raises DamagedArchiveError."""
    is_first = True
    try:
        while chunk := packed.read(CHUNK_BYTES):
            if is_first and not chunk.strip(b"\0"):
                raise DamagedArchiveError("it holds nothing but zeros")
            is_first = False
            yield chunk
    except DamagedArchiveError:
        raise
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's error, not the decompressor's
            raise
        raise DamagedArchiveError(f"it is damaged or cut short: {error}") from error
