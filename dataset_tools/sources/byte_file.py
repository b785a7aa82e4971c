"""Reading a piece of a file, from any process and thread."""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path


class ByteFile:
    """A file read by position (`os.pread`), so that threads and forked processes can share the descriptor.

    Opened at the first read in each process; pickling carries the path only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def read(self, offset: int, size: int, sample: str) -> bytes:
        """`size` bytes from `offset` on. Raises OSError, naming `sample`, if the file is gone or cut."""
        data = bytearray(size)
        self.read_into(offset, memoryview(data), sample)
        return bytes(data)

    def read_into(self, offset: int, target: memoryview, sample: str) -> None:
        """Fills `target` with the bytes from `offset` on. Raises OSError as `read` does."""
        done = 0
        try:
            file = self._opened()
            while done < len(target) and (more := os.preadv(file.fileno(), [target[done:]], offset + done)):
                done += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read sample {sample!r} of {self.path}: {error}") from error
        if done != len(target):
            raise OSError(
                f"cannot read sample {sample!r}: {self.path} holds {done} of its {len(target)} bytes at offset "
                f"{offset}; the file was cut short after it was opened"
            )

    def will_need(self, offset: int, size: int) -> None:
        """A hint: the system may fetch these bytes from the disk."""
        with suppress(OSError):
            file = self._opened()
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> FileIO:
        """The open file; who reads keeps it alive, since two threads may open it at the same moment."""
        file = self._file or FileIO(self.path)
        self._file = file
        return file

    def __reduce__(self) -> tuple[type[ByteFile], tuple[Path]]:
        return ByteFile, (self.path,)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()
