"""Times of calls on any device: device events on a GPU, the wall clock on a CPU; and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

_GIB = 2**30


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls_ms(
    call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int, max_s: float = 60.0
) -> list[float]:
    """Milliseconds of each of `repeats` calls, after `warmup` that are not timed; at least two, and no more once
    `max_s` seconds have gone.

    On a GPU the calls are enqueued one after the other and timed by events between them, so the time of a call is the
    device's, or the host's where the host cannot keep up.
    """
    start = time.perf_counter()
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < repeats and (len(times) < 2 or time.perf_counter() - start < max_s):
            before = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - before))
        return times
    marks = [_recorded_event()]
    while len(marks) <= repeats and (len(marks) <= 2 or time.perf_counter() - start < max_s):
        call()
        marks.append(_recorded_event())
        if len(marks) > 3:
            marks[-3].synchronize()  # else the host would run ahead and see no time go
    synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def memory_in_use_gib(device: torch.device) -> float | None:
    """GiB of PyTorch's tensors on a GPU; None on a CPU."""
    return torch.cuda.memory_allocated(device) / _GIB if device.type == "cuda" else None


def peak_memory_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """GiB that PyTorch's tensors took at most during a call, above what they took before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / _GIB


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
