"""How far a conversion is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

logger = logging.getLogger(__name__)

REFRESH_S = 0.2
LINE_EVERY_S = 10.0


class Progress:
    """A bar, drawn by the converting thread itself, since that one forks; without a terminal, lines for a log."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        is_terminal = console is not None and console.is_terminal
        self._bar = _TwoLines(*columns, console=console, auto_refresh=False, expand=True) if is_terminal else None

    def start(self, split: str, total: int, done: int) -> None:
        """A split of `total` images, of which `done` were done before, begins."""
        self.split, self.total, self.done_before = split, total, done
        self.began = self.shown = time.monotonic()
        self.bytes_before: int | None = None if done else 0
        if self._bar is None:
            logger.info("%s: %s images%s", split, f"{total:,}", f", {done:,} of them done before" if done else "")
            return
        self._bar.start()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(split, total=total, completed=done, rates="")

    def update(self, done: int, counts: dict[str, int]) -> None:
        """`done` images of the split are done in all; `counts`: passed_through, reencoded, quarantined, bytes."""
        if self.bytes_before is None:
            self.bytes_before = counts["bytes"]
        now = time.monotonic()
        if done < self.total and now - self.shown <= (REFRESH_S if self._bar else LINE_EVERY_S):
            return
        self.shown, seconds = now, max(now - self.began, 1e-9)
        rates = (
            f"{(done - self.done_before) / seconds:,.0f} images/s, "
            f"{(counts['bytes'] - self.bytes_before) / seconds / 1e6:,.0f} MB/s; passed {counts['passed_through']:,}, "
            f"re-encoded {counts['reencoded']:,}, quarantined {counts['quarantined']:,}"
        )
        if self._bar is None:
            logger.info("%s: %s of %s, %s", self.split, f"{done:,}", f"{self.total:,}", rates)
        else:
            self._bar.update(self._bar.task_ids[0], completed=done, rates=rates, refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


class _TwoLines(RichProgress):
    """The bar with count and time on one line, the rates below it: both are readable in 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['rates']}", overflow="ellipsis", no_wrap=True)
