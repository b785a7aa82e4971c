"""Interleaved timing of calls on any device, by events on a GPU and by the clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from leoclr_fast.bench.timing import Call, interleaved, synchronize


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
