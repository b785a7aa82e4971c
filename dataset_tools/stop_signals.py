"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 as a wish that a long loop grants between two of its steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""A terminal's Ctrl-C; what schedulers and torchrun send; what a terminal sends that is closed; what SLURM sends early
if it is asked to. One that is ignored, as SIGHUP under nohup, stays so."""

_AT_ONCE_AFTER_S = 0.5


class StoppedBySignalError(RuntimeError):
    """A signal ended the run in an orderly way: everything is saved."""


class StoppedAtOnce(KeyboardInterrupt):
    """A signal cut short what could not be asked, or need not be saved. No `except Exception` takes it for a fault."""


@dataclass(slots=True)
class StopSignals:
    """Whether a signal asked for the end, and which."""

    requested: bool = False
    name: str = ""
    saving: bool = False
    """Set it before what must not be cut short: from then on every further signal is ignored."""
    repeats_insist: bool = True
    """Whether a second signal of any kind interrupts at once; else only a second Ctrl-C half a second later does."""
    patience_s: float | None = None
    """How long the first signal waits to be granted; then StoppedAtOnce is raised where the main thread is. It is a
    number (0: at once) around what may be cut short and may take long, such as compiling, and None elsewhere."""
    _is_overdue: bool = False
    _since_s: float = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if not self.requested:
            self.requested, self.name, self._since_s = True, signal.Signals(number).name, time.monotonic()
            if self.patience_s == 0:
                self._cut_short()
            elif self.patience_s is not None:
                timer = threading.Timer(self.patience_s, self._insist)
                timer.daemon = True
                timer.start()
        elif self._is_overdue and self.patience_s is not None:
            self._cut_short()
        elif not self.saving and (self.repeats_insist or self._is_meant(number)):
            raise KeyboardInterrupt

    def raise_if_requested(self, then: str = "; give the same command again") -> None:
        """Raises StoppedBySignalError, whose message ends with `then`."""
        if self.requested:
            raise StoppedBySignalError(f"stopped by {self.name}{then}")

    def _insist(self) -> None:
        """In a thread of its own: the signal was not granted in time, and comes again."""
        self._is_overdue = True
        main = threading.main_thread().ident
        if self.patience_s is not None and main is not None:
            signal.pthread_kill(main, signal.Signals[self.name])

    def _cut_short(self) -> None:
        if not self.saving:
            raise StoppedAtOnce(
                f"stopped by {self.name}; what was saved before is kept, and the same command continues"
            )

    def _is_meant(self, number: int) -> bool:
        """Not sent by a scheduler and torchrun both, nor by a terminal to a whole group of processes."""
        return number == signal.SIGINT and time.monotonic() - self._since_s > _AT_ONCE_AFTER_S


@contextmanager
def stop_signals(*, repeats_insist: bool = True) -> Iterator[StopSignals]:
    """Receive signals instead of dying of them; the handlers of before come back at the end. See `StopSignals`."""
    stop = StopSignals(repeats_insist=repeats_insist)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, stop.receive) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) == stop.receive:
                signal.signal(number, handler)
