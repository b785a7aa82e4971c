"""Interleaved rounds of what is timed, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from leoclr_fast.bench.config import LEAST_ROUNDS

Name = TypeVar("Name")
Say = Callable[[str], None]
Call = Callable[[], object]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def interleaved(
    names: Sequence[Name], rounds: int, *, warmup: int = 0, max_s: float = math.inf, say: Say = lambda _: None
) -> Iterator[tuple[int, Name]]:
    """The number of the round, below zero in the ``warmup`` rounds, and a name: all names in every round, in an order
    that rotates. After the second round, none begins when ``max_s`` seconds have gone.
    """
    start = time.perf_counter()
    for number in range(-warmup, rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > max_s:
            say(f"stopped after {number} of {rounds} rounds: {max_s:.0f} s have gone")
            return
        first = number % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            yield number, name


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_mib(call: Call, device: torch.device) -> float | None:
    """The most memory that a call holds beyond what was held before; None where the system does not tell.

    On a GPU: allocated tensors. On a CPU: resident memory of the process, after its free memory was given back.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak starts anew
        before = _resident_kib("VmRSS")
        call()
        return max(0, _resident_kib("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return None


def _resident_kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])
