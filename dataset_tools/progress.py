"""Long work shows how far it is, or how long it has been at it: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dataset_tools.terminal import PlainConsole

log = logging.getLogger(__name__)

QUIET_S = 10.0
LINE_EVERY_S = 30.0


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of `total` were done since it was called last.

    Work that takes less than 10 s shows nothing. `what`: "kNN features".
    """
    start_s, done, next_line_s = time.monotonic(), 0, QUIET_S
    with ExitStack() as stack:
        bar: Progress | None = None

        def advance(number: int) -> None:
            nonlocal done, next_line_s, bar
            done += number
            passed_s = time.monotonic() - start_s
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif passed_s >= next_line_s and done < total:
                next_line_s = passed_s + LINE_EVERY_S
                bar = _bar(what, total, unit, stack)
                if bar is None:
                    left = timedelta(seconds=round(passed_s * (total - done) / done))
                    log.info(f"{what}: {done:,} of {total:,} {unit}, {done / passed_s:,.0f} a second, {left} left")

        yield advance


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Says after 10 s, and then every 30 s, for how long `what` has been going on, of which nobody knows how far it is.

    Yields a function to be called when that is over, if it is before the end of the `with`.
    """
    over, start_s = threading.Event(), time.monotonic()

    def tell() -> None:
        pause_s = QUIET_S
        while not over.wait(pause_s):
            pause_s = LINE_EVERY_S
            log.info(f"{what}: {timedelta(seconds=round(time.monotonic() - start_s))} so far")

    threading.Thread(target=tell, name="waiting", daemon=True).start()
    try:
        yield over.set
    finally:
        over.set()


def _bar(what: str, total: int, unit: str, stack: ExitStack) -> Progress | None:
    """A bar until the stack is left; None where there is no terminal, or another bar is on it."""
    console = PlainConsole()
    if not console.is_terminal:
        return None
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task("", total=total)
    try:
        return stack.enter_context(bar)
    except LiveError:
        return None
