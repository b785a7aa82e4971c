"""How long an evaluation may stay at one batch before it counts as hanging."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TypeVar

from leoclr_fast.distributed.watchdog import Watchdog

START_LIMIT_S = 1500.0
"""For the first two batches, which start the loader and compile; less than a collective is waited for."""
BATCH_LIMIT_S = 300.0
"""For each later one, together with the checkpoint that may follow it; at least ten times the longest so far."""

_OVERDUE_FACTOR = 10

Batch = TypeVar("Batch")


class Pace:
    """Tells the watchdog of each batch. With one rank it does nothing."""

    def __init__(self, watchdog: Watchdog | None = None) -> None:
        self._watchdog = watchdog

    def batches(self, what: str, batches: Iterable[Batch], done: int = 0) -> Iterator[Batch]:
        """The batches as they come; a rank that is overdue with one, and does not wait for another, ends all of them.

        What is done with a batch counts, until the next one is asked for. what: names the work in the message.
        done: batches of the same work that were finished before.
        """
        if self._watchdog is None:
            yield from batches
            return
        iterator, longest_s = iter(batches), 0.0
        for number in count():
            began_s = time.monotonic()
            limit_s = START_LIMIT_S if number < 2 else max(BATCH_LIMIT_S, _OVERDUE_FACTOR * longest_s)
            with self._watchdog.phase(what, limit_s):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                yield batch
            self._watchdog.progress(done + number + 1)
            if number:
                longest_s = max(longest_s, time.monotonic() - began_s)
