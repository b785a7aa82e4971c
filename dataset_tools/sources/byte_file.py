"""Reading a piece of a file, from any process and thread."""

from __future__ import annotations

import os
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
        try:
            file = self._file or FileIO(self.path)
            self._file = file
            data = os.pread(file.fileno(), size, offset)
            while 0 < len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise OSError(error.errno, f"cannot read sample {sample!r} of {self.path}: {error}") from error
        if len(data) != size:
            raise OSError(
                f"cannot read sample {sample!r}: {self.path} holds {len(data)} of its {size} bytes at offset "
                f"{offset}; the file was cut short after it was opened"
            )
        return data

    def __reduce__(self) -> tuple[type[ByteFile], tuple[Path]]:
        return ByteFile, (self.path,)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()
