"""Reads and writes that are complete, or an error."""

from __future__ import annotations

import os
from collections.abc import Sequence

MAX_PIECES = 1024
"""Linux's IOV_MAX."""


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
