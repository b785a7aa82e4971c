"""Arrays that one of a node's ranks makes and all of them use: in memory that ends with the last process that has it.

They lie in a memory file (`memfd_create`) of the rank that came first, which the others open through /proc. So nothing
is left behind by a run that is killed, but a few bytes in the folder for temporary files that say where they are.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def num_local_ranks() -> int:
    """How many ranks run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def made_once(key: str, make: Callable[[], Arrays]) -> tuple[Arrays, bool]:
    """What ``make`` returns, called by the first of this node's ranks alone; and whether that was this one.

    key: of letters and digits, the same on all ranks, another one for other arrays. The others wait. What ``make``
    raises is raised here, and the next rank then tries. A rank that is alone, or cannot open what another has made,
    makes its own.
    """
    if num_local_ranks() == 1:
        return make(), True
    name = f"leoclr-{os.getuid()}-{os.getppid()}-{key}"  # ranks of a node have one parent
    place = os.open(Path(tempfile.gettempdir()) / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(place, "r+") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        if os.fstat(place).st_uid == os.getuid() and (found := _opened(note.read(), name)) is not None:
            return found, False
        file, layout = _written(make(), name)
        note.seek(0)
        note.truncate()
        note.write(json.dumps({"process": os.getpid(), "file": file, "arrays": layout}))
        return _mapped(file, layout), True


def _written(arrays: Arrays, name: str) -> tuple[int, list[Any]]:
    """A memory file, which stays open as long as the process lives, and where in it each array is."""
    file, layout, offset = os.memfd_create(name), [], 0
    for array_name, array in arrays.items():
        layout.append((array_name, array.dtype.str, array.shape, offset))
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while view:
            written = os.write(file, view[: 1 << 30])
            view, offset = view[written:], offset + written
        offset = -(-offset // 64) * 64
        os.ftruncate(file, max(1, offset))
        os.lseek(file, offset, os.SEEK_SET)
    return file, layout


def _opened(text: str, name: str) -> Arrays | None:
    """The arrays of another process that is still there; None if they are not."""
    try:
        note = json.loads(text)
        path = f"/proc/{note['process']}/fd/{note['file']}"
        if os.readlink(path).removesuffix(" (deleted)") != f"/memfd:{name}":
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        return _mapped(file, note["arrays"])
    finally:
        os.close(file)


def _mapped(file: int, layout: list[Any]) -> Arrays:
    memory = np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8)
    arrays: Arrays = {}
    for name, dtype, shape, offset in layout:
        num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays[name] = memory[offset : offset + num_bytes].view(dtype).reshape(shape)
    return arrays
