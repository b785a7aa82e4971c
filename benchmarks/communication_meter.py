"""What the collectives of a run cost: their number, their bytes and the time that the device spent in them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CommunicationMeter:
    """Counts the collectives of one rank. On a GPU their time is measured by events, without waiting for the device.

    The time of a collective includes what this rank waits there for the others; of one that runs beside the backward
    pass it is only what the step waits for its end.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """Collectives of each kind."""
        self.bytes: Counter[str] = Counter()
        """Bytes of each kind: all_reduce, the tensor that is summed; all_gather, what all ranks give together;
        all_to_all, what this rank gives, its own share included."""
        self._host_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def collective(self, kind: str, tensor: Tensor) -> Iterator[None]:
        """Count what runs in here as one collective on this tensor."""
        self.calls[kind] += 1
        self.bytes[kind] += tensor.numel() * tensor.element_size()
        if tensor.device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._events.append((before, after))
            return
        start = time.perf_counter()
        yield
        self._host_s += time.perf_counter() - start

    def seconds(self) -> float:
        """Time in the collectives so far. The device must have finished them."""
        return self._host_s + sum(before.elapsed_time(after) for before, after in self._events) / 1000

    def reset(self) -> None:
        self.calls.clear()
        self.bytes.clear()
        self._host_s = 0.0
        self._events.clear()
