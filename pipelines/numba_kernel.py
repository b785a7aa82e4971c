"""A loop that numba compiles once for each machine, and the threads that run it.

The threads are Python's, and the loop does without its lock: numba's own ("workqueue") end the process when two Python
threads need them at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from numba import njit

log = logging.getLogger(__name__)


def compile_kernel(function: Callable[..., None], signature: Any, what: str) -> Callable[..., None]:
    """A function as machine code, from numba's cache on the disk where there is one.

    signature: numba's. what: the function, to a reader of the log. The cache looks at the function's own file alone:
    what it is compiled of belongs there too.
    """
    try:
        return _compile(function, signature, cached=True)
    except (OSError, RuntimeError) as error:  # no folder to write to, or no space
        log.info("numba's cache is out of use, so that %s is compiled anew in every process: %s", what, error)
        return _compile(function, signature, cached=False)


def _compile(function: Callable[..., None], signature: Any, *, cached: bool) -> Callable[..., None]:
    dispatcher = njit(nogil=True, error_model="numpy", cache=cached)(function)
    dispatcher.compile(signature)
    return dispatcher


def run_in_threads(work: Callable[[], None], num_threads: int) -> None:
    """Call ``work`` in so many threads, this one among them, and wait for all. Each call takes what is left to do."""
    helpers = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun would find nothing to do
            helper.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="compiled loop")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
