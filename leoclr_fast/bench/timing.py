"""Interleaved timing of calls on any device, by events on a GPU and by the clock on a CPU; and their peak memory."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def interleaved_ms(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 2,
    lead: int = 0,
    max_s: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds of each call, of which there may be none, in each round after the ``warmup`` rounds.

    On a GPU by its own events, from an idle device: where the host is slower than the device, the host is measured.
    With ``lead`` calls just before, which are not timed, the device is busy with them while the host prepares, as in a
    training.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number, name in interleaved(list(calls), rounds, warmup=warmup, max_s=max_s):
        taken = _timed_ms(calls[name], device, lead)
        if number >= 0:
            times[name].append(taken)
    return times


def _timed_ms(call: Call, device: torch.device, lead: int) -> float:
    synchronize(device)
    for _ in range(lead):
        call()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def captured(call: Call) -> Call:
    """The call as a replay of a CUDA graph: what the device alone takes. Raises RuntimeError if it cannot be captured.

    The call must have run before, so that nothing is compiled during the capture.
    """
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()  # its memory belongs to the graph

    def replay() -> object:
        graph.replay()
        return kept

    return replay


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
