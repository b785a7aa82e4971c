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
REFRESH_S = 0.2


@contextmanager
def progress(what: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields a function that takes how many of `total` images were done since its last call, and a note to be shown.

    Work that takes less than 10 s shows nothing. `what`: "kNN features". `done`: how many were done before. No thread
    draws the bar: processes may be forked meanwhile.
    """
    start_s, before, next_s = time.monotonic(), done, QUIET_S
    with ExitStack() as stack:
        bar: Progress | None = None

        def advance(number: int, note: str = "") -> None:
            nonlocal done, next_s, bar
            done += number
            passed_s = time.monotonic() - start_s
            if passed_s < next_s or done >= total:
                return
            bar = bar or _bar(what, total, stack)
            next_s = passed_s + (REFRESH_S if bar else LINE_EVERY_S)
            if bar:
                bar.update(bar.task_ids[0], completed=done, note=note, refresh=True)
                return
            speed = (done - before) / passed_s
            left = timedelta(seconds=round((total - done) / max(speed, 1e-9)))
            line = f"{what}: {done:,} of {total:,} images, {speed:,.0f} a second, {left} left"
            log.info(f"{line}; {note}" if note else line)

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


def _bar(what: str, total: int, stack: ExitStack) -> Progress | None:
    """A bar until the stack is left; None where there is no terminal, or another bar is on it."""
    console = PlainConsole()
    if not console.is_terminal:
        return None
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    bar.add_task("", total=total, note="")
    try:
        return stack.enter_context(bar)
    except LiveError:
        return None
