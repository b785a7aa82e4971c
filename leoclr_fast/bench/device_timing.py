"""Contestants that take turns in one process, each call timed on its device, and the memory that a call takes."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def first_results(calls: dict[str, Callable[[], T]], needed: str, left_out: dict[str, str]) -> dict[str, T]:
    """What each call returns; this is where what is compiled at its first call is compiled.

    A call that raises is taken out of ``calls`` and its error goes to ``left_out``, unless it is the ``needed`` one.
    """
    results = {}
    for name, call in list(calls.items()):
        try:
            results[name] = call()
        except Exception as error:
            if name == needed:
                raise
            del calls[name]
            left_out[name] = (str(error).strip() or repr(error)).splitlines()[0]
    return results


def interleaved_ms(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call, of which there may be none, in each round; the order rotates, and two first rounds are
    not counted.

    On a GPU by its own events, from an idle device: where the host is slower than the device, the host is measured.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-2, rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            taken = _timed_ms(calls[name], device)
            if number >= 0:
                times[name].append(taken)
    return times


def _timed_ms(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
