"""A lock on a file, for which a moment is waited."""

from __future__ import annotations

import fcntl
import time
from typing import IO

LOCK_WAIT_S = 2.0
"""A process that was just killed, a worker that it had just forked, or a reader that looks whether the lock is held may
hold it for a moment."""
_PAUSE_S = 0.05


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
