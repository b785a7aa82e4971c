"""Threads that work ahead, and whose trouble becomes an error of who waits for them: never an endless wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LOOK_EVERY_S = 1.0
_CLOSE_WITHIN_S = 10.0

_Call = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class WorkerThreads:
    """Daemon threads that make calls in the order in which they were submitted."""

    def __init__(self, name: str, num_threads: int) -> None:
        """name: what the threads are called in error messages and by debuggers."""
        self.name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls,), name=f"{name} {number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        self._calls.put((future, call, args, kwargs))
        return future

    def result(self, future: Future[R], *, limit_s: float, doing: Callable[[], str]) -> R:
        """What the call returned or raised.

        Raises RuntimeError soon after a thread has died, and when nothing came for ``limit_s``; ``doing`` says what
        is being waited for.
        """
        began = time.monotonic()
        while not future.done():
            waited = time.monotonic() - began
            if not all(thread.is_alive() for thread in self._threads):
                raise RuntimeError(f"a {self.name} thread has died while {doing()}")
            if waited > limit_s:
                raise RuntimeError(
                    f"the {self.name} thread has not answered for {waited:.0f} s while {doing()}; look at the disk and "
                    "at the machine's load, or allow more by stall_timeout_s"
                )
            try:
                return future.result(timeout=min(_LOOK_EVERY_S, max(0.01, limit_s - waited)))
            except TimeoutError:
                if future.done():  # the call's own
                    raise
        return future.result()

    def close(self) -> None:
        """Ends the threads when they have made all calls; one that hangs is left behind."""
        for _ in self._threads:
            self._calls.put(None)
        patience = time.monotonic() + _CLOSE_WITHIN_S
        for thread in self._threads:
            if thread is not threading.current_thread():  # it may hold the last reference to the owner
                thread.join(max(0.0, patience - time.monotonic()))


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (given := calls.get()) is not None:
        _make(*given)
        del given  # else the last batch would live until the next call


def _make(future: Future[Any], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
