"""SIGINT, SIGTERM and SIGUSR1 as a wish that a long loop grants between two of its steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""A terminal's Ctrl-C; what schedulers and torchrun send; what SLURM sends early if it is asked to."""

_AT_ONCE_AFTER_S = 0.5


class StoppedBySignalError(RuntimeError):
    """A signal ended the run in an orderly way: everything is saved."""


@dataclass(slots=True)
class StopSignals:
    """Whether a signal asked for the end, and which."""

    requested: bool = False
    name: str = ""
    saving: bool = False
    """Set it before what must not be cut short: from then on every further signal is ignored."""
    _since_s: float = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        A scheduler and torchrun may both send the same signal, so that repeated ones mean nothing new. A second Ctrl-C
        half a second later means it, and interrupts at once.
        """
        if not self.requested:
            self.requested, self.name, self._since_s = True, signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and not self.saving and time.monotonic() - self._since_s > _AT_ONCE_AFTER_S:
            raise KeyboardInterrupt


@contextmanager
def stop_signals(enabled: bool) -> Iterator[StopSignals]:
    """Receive signals instead of dying of them; the handlers of before come back at the end."""
    stop = StopSignals()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.receive) for number in HANDLED}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
