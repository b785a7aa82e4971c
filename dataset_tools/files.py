"""Files: reads and writes that are complete, or an error; locks for which a moment is waited."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

MAX_PIECES = 1024
"""Linux's IOV_MAX."""
LOCK_WAIT_S = 2.0
"""A process that was just killed, a worker that it had just forked, or a reader that looks whether the lock is held may
hold it for a moment."""
_PAUSE_S = 0.05
_WANTED_FILES = 1 << 14


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset` on. Raises OSError if the file ends before."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise OSError(f"the file ends {size - len(data)} bytes too early")
    return data


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data`, at `offset`. Raises OSError, as for a full disk."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_pieces(descriptor: int, pieces: Sequence[memoryview | bytes]) -> None:
    """All of `pieces`, one behind the other, at the file's position. Raises OSError, as for a full disk."""
    for start in range(0, len(pieces), MAX_PIECES):
        some = pieces[start : start + MAX_PIECES]
        left = sum(map(len, some))
        written = os.writev(descriptor, some)
        if written < left:  # nearly full, a signal, or more than 2 GiB
            rest = memoryview(b"".join(some))[written:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` whole and synced to the disk, or not at all. `name` is its path so far.

    It is written under a fresh name in the same folder, which it alone may make, and then takes the place of what is at
    `path`; a symbolic link there is replaced, not followed. Several processes may do this at once: the last one wins.
    Raises OSError, also where `path` is a device or a pipe, such as /dev/null.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is {_kind(path.stat().st_mode)}, which no file can replace")
    fresh = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(fresh, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(fresh):
            error.filename = str(path)
            del error.filename2
        raise
    sync_folder(path.parent)


def write_file(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a whole file (text as UTF-8) as `written` does."""
    with written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an .npz, which appears whole or not at all; `numpy.load` reads it. No array may hold objects."""
    with written(path) as file:
        named: dict[str, Any] = dict(arrays)
        np.savez(file, **named)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_own(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Opens a file of a fixed name as `open` does, but never through a symbolic link.

    A mode with "w" makes a new file in the place of what is there. Raises OSError, also for what is no regular file.
    """
    if "w" in mode:
        path.unlink(missing_ok=True)
        mode = mode.replace("w", "x")
    return _open_regular(path, mode, buffering, os.O_NOFOLLOW)


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> IO[bytes]:
    """Opens a file to read. Raises OSError, NoRegularFileError for what is none: a pipe would be waited for forever."""
    return _open_regular(Path(path), "rb", buffering, 0)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a regular file. Raises as `open_regular` does."""
    with open_regular(path, buffering=0) as file:
        return file.read()


def _open_regular(path: Path, mode: str, buffering: int, more_flags: int) -> IO[Any]:
    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK | more_flags, 0o666)
        found = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(found) and not stat.S_ISDIR(found):  # of which `open` says it itself
            os.close(descriptor)
            raise NoRegularFileError(errno.EINVAL, f"{path} is {_kind(found)}, and not a file")
        return descriptor

    try:
        return open(path, mode, buffering, opener=opener)
    except OSError as error:
        if more_flags and path.is_symlink() and error.errno == errno.ELOOP:
            raise OSError(f"{path} is a symbolic link, and files of this name are not written through one") from error
        if error.errno == errno.ENXIO:  # of a socket, or a pipe
            raise NoRegularFileError(errno.EINVAL, f"{path} is {_kind(path.stat().st_mode)}, and not a file") from error
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            what = f"{path}: {error.strerror} (a link that leads nowhere)"
            raise NoRegularFileError(error.errno, what) from error
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for test, kind in kinds.items() if test(mode)), "a device")


class NoRegularFileError(OSError):
    """Where a file should be is a named pipe, a socket, a device, or a link that leads nowhere."""

    def __str__(self) -> str:
        return str(self.strerror)


_NAMES = "EMFILE ENFILE ENOMEM EIO ESTALE ENOSPC EDQUOT ENODEV ENOTCONN ETIMEDOUT EHOSTDOWN EREMOTEIO"
MACHINE_ERRORS = frozenset(getattr(errno, name) for name in _NAMES.split(" "))


def raise_if_of_machine(error: OSError) -> None:
    """Raises an error again that is no fault of the file it happened at: no room, no memory, a disk that fails."""
    if error.errno in MACHINE_ERRORS:
        raise error


def allow_open_files() -> int:
    """How many files this process may open, after the soft limit was raised as far as we want and the hard one lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _WANTED_FILES:
        soft = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else soft


class _Descriptor:
    """A file to read, open for as long as somebody has this object."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, buffering=0)
        self.number = self._file.fileno()

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self._file.close()


class ByteFile:
    """A file read by position (`os.pread`), so that threads and forked processes can share the descriptor.

    Opened at the first read in each process; pickling carries the path only. At most a quarter of the files that a
    process may open are open at a time, however many shards there are: the one that was opened first is let go.
    """

    _open_files: ClassVar[deque[ReferenceType[ByteFile]]] = deque()
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: _Descriptor | None = None

    def read(self, offset: int, size: int, sample: str) -> bytes:
        """`size` bytes from `offset` on. Raises OSError, naming `sample`, if the file is gone or cut."""
        data = bytearray(size)
        self.read_into(offset, memoryview(data), sample)
        return bytes(data)

    def read_into(self, offset: int, target: memoryview, sample: str) -> None:
        """Fills `target` with the bytes from `offset` on. Raises OSError as `read` does."""
        done = 0
        try:
            file = self._file or self._open()  # who reads keeps it alive: another thread may let it go meanwhile
            while done < len(target) and (more := os.preadv(file.number, [target[done:]], offset + done)):
                done += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read sample {sample!r} of {self.path}: {error.strerror}") from error
        if done != len(target):
            raise OSError(
                f"cannot read sample {sample!r}: {self.path} holds {done} of its {len(target)} bytes at offset "
                f"{offset}; the file was cut short after it was opened"
            )

    def will_need(self, offset: int, size: int) -> None:
        """A hint: the system may fetch these bytes from the disk."""
        with suppress(OSError):
            file = self._file or self._open()
            os.posix_fadvise(file.number, offset, size, os.POSIX_FADV_WILLNEED)

    def _open(self) -> _Descriptor:
        with ByteFile._lock:
            while len(ByteFile._open_files) >= max(8, allow_open_files() // 4):
                ByteFile._let_go_first()
            try:
                file = self._file = self._file or _Descriptor(self.path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                while ByteFile._open_files:  # others have taken more than three quarters
                    ByteFile._let_go_first()
                file = self._file = _Descriptor(self.path)
            ByteFile._open_files.append(ref(self))
            return file

    @staticmethod
    def _let_go_first() -> None:
        if (first := ByteFile._open_files.popleft()()) is not None:
            first._file = None  # its next read opens it again

    def __reduce__(self) -> tuple[type[ByteFile], tuple[Path]]:
        return ByteFile, (self.path,)


os.register_at_fork(after_in_child=lambda: setattr(ByteFile, "_lock", threading.Lock()))  # another thread may hold it


def take_lock(file: int | IO[str], wait_s: float = LOCK_WAIT_S) -> None:
    """Lock an open file, or its descriptor, against everybody else.

    Raises BlockingIOError if another process holds it for longer, OSError where the file system knows no locks.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:  # the second is what NFS may say
            if time.monotonic() > deadline:
                raise BlockingIOError(error.errno, error.strerror) from error
            time.sleep(_PAUSE_S)
