"""SIGINT and SIGTERM as a wish that a long loop grants between two of its steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class StoppedBySignalError(RuntimeError):
    """A signal ended the run in an orderly way: everything is saved."""


@dataclass(slots=True)
class StopSignals:
    """Whether a signal asked for the end, and which."""

    requested: bool = False
    name: str = ""

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler; a second signal means it, and interrupts at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name


@contextmanager
def stop_signals(enabled: bool) -> Iterator[StopSignals]:
    """Receive SIGINT and SIGTERM instead of dying of them; the handlers of before come back at the end."""
    stop = StopSignals()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
