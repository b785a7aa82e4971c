"""The fake GPU, seen from a program that runs on it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = ("synchronisations", "launches", "pageable_copies", "graph_launches", "illegal_calls", "graph_nodes")
_library = ctypes.CDLL("libcuda.so.1")
_library.fake_gpu_uses.restype = ctypes.c_long
_library.fake_gpu_set_memory.restype = _library.fake_gpu_memory_used.restype = ctypes.c_size_t


def counts() -> dict[str, int]:
    """How often each has happened so far; graph_nodes is the size of the graph that was captured last."""
    values = (ctypes.c_long * len(_NAMES))()
    _library.fake_gpu_counts(values)
    return dict(zip(_NAMES, values, strict=True))


def uses(device: int) -> int:
    """How many calls a device has needed a context for: memory, also pinned, streams, events, copies, kernels."""
    count: int = _library.fake_gpu_uses(device)
    return count


class Counted(dict[str, int]):
    """What happened within `counted`, once it is over."""


@contextmanager
def counted() -> Iterator[Counted]:
    before, happened = counts(), Counted()
    yield happened
    happened.update({name: value - before[name] for name, value in counts().items()})
    happened["graph_nodes"] += before["graph_nodes"]


@contextmanager
def logged() -> Iterator[list[str]]:
    """A line for each launch, copy and illegal call in here, once it is over."""
    lines: list[str] = []
    _library.fake_gpu_log(1)
    yield lines
    _library.fake_gpu_log(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        _library.fake_gpu_write_log(str(path).encode())
        lines += path.read_text().splitlines()


@contextmanager
def free_memory(num_bytes: int) -> Iterator[None]:
    """So many bytes are left on the device."""
    before = _library.fake_gpu_set_memory(ctypes.c_size_t(_library.fake_gpu_memory_used() + num_bytes))
    try:
        yield
    finally:
        _library.fake_gpu_set_memory(ctypes.c_size_t(before))
