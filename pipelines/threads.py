"""The cores that this process may keep busy, and threads that work ahead or beside."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CLOSE_WITHIN_S = 10.0


def available_cores() -> int:
    """This process's fair share of the cores, at least one: its affinity mask's, divided by the machine's ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def run_in_threads(work: Callable[[], None], num_threads: int) -> None:
    """Call ``work`` in so many threads, this one among them, and wait for all. Each call takes what is left to do.

    The threads are Python's, for compiled loops without its lock: numba's own ("workqueue") end the process when two
    Python threads need them at once.
    """
    helpers = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun would find nothing to do
            helper.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="compiled loop")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


class WorkerThreads:
    """Daemon threads that make calls in the order in which they were submitted; trouble becomes an error of who waits.

    A thread that hangs keeps the process from ending no longer than `close` waits, unlike one of an executor.
    """

    def __init__(self, name: str, num_threads: int, at_start: Callable[[], None]) -> None:
        """name: what the threads are called in error messages and by debuggers. at_start: each calls it first."""
        self.name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls, at_start), name=f"{name} {number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        self._calls.put((future, lambda: call(*args, **kwargs)))
        return future

    def result(self, future: Future[R], *, limit_s: float, doing: Callable[[], str]) -> R:
        """What the call returned or raised.

        Raises RuntimeError when nothing came for ``limit_s``; ``doing`` says what is being waited for.
        """
        try:
            return future.result(timeout=limit_s)
        except TimeoutError:
            if future.done():  # the call's own
                raise
            raise RuntimeError(
                f"the {self.name} thread has not answered for {limit_s:.0f} s while {doing()}; look at the disk and "
                "at the machine's load, or allow more by stall_timeout_s"
            ) from None

    def close(self) -> None:
        """Ends the threads when they have made all calls; one that hangs is left behind."""
        for _ in self._threads:
            self._calls.put(None)
        patience = time.monotonic() + _CLOSE_WITHIN_S
        for thread in self._threads:
            if thread is not threading.current_thread():  # it may hold the last reference to the owner
                thread.join(max(0.0, patience - time.monotonic()))


def _work(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], at_start: Callable[[], None]) -> None:
    at_start()
    while (given := calls.get()) is not None:
        _make(*given)
        del given  # else the last batch would live until the next call


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
