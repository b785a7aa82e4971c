"""Arrays that one of a node's ranks makes and all of them use: in memory that ends with the last process that has it.

They lie in memory files (`memfd_create`) of the rank that came first, which the others open through /proc. So nothing
is left behind by a run that is killed, but a few bytes in the folder for temporary files that say where they are.
"""

from __future__ import annotations

import fcntl
import json
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
        paths = {array_name: _saved(array, name) for array_name, array in make().items()}
        note.seek(0)
        note.truncate()
        note.write(json.dumps(paths))
        return _mapped(paths), True


def _saved(array: npt.NDArray[Any], name: str) -> str:
    """Where an array lies, in a memory file that stays open as long as the process lives."""
    descriptor = os.memfd_create(name)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        np.save(file, array)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _opened(text: str, name: str) -> Arrays | None:
    """The arrays of another process that is still there; None if they are not."""
    try:
        paths = json.loads(text)
        if all(os.readlink(path).removesuffix(" (deleted)") == f"/memfd:{name}" for path in paths.values()):
            return _mapped(paths)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    return None


def _mapped(paths: dict[str, str]) -> Arrays:
    return {name: np.asarray(np.load(path, mmap_mode="r+")) for name, path in paths.items()}
