"""Interleaved rounds of what is timed, and the peak memory of a call."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from leoclr_fast.bench.config import LEAST_ROUNDS

Name = TypeVar("Name")
Say = Callable[[str], None]
Call = Callable[[], object]


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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_mib(call: Call, device: torch.device) -> float | None:
    """The most memory of allocated tensors on a GPU that a call holds beyond what was held before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
