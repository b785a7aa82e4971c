"""Copies to a GPU beside what it computes, on a stream of their own; on a CPU nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class DeviceCopies:
    """Of pinned host memory, which torch's allocator does not hand out again before its copies are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def run_beside(self) -> bool:
        """Whether it is worth starting a copy before its batch is wanted."""
        return self._stream is not None

    def start(self, host: Tensor) -> PendingCopy:
        """Begin a copy."""
        if self._stream is None:
            return PendingCopy(host.to(self._device), None)
        with torch.cuda.stream(self._stream):
            copied = host.to(self._device, non_blocking=True)
        return PendingCopy(copied, self._stream.record_event())


@dataclass(frozen=True, slots=True)
class PendingCopy:
    """A copy that was begun."""

    tensor: Tensor
    """On the device. Nothing may use it before `wait`."""
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """The current stream goes on when the copy is done; the host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.done)
            self.tensor.record_stream(stream)
