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
    """Shows nothing; what the others are."""

    def start(self, split: str, total: int, done: int) -> None:
        """A split of `total` images, of which `done` were done before, begins."""
        self.split, self.total, self.done_before = split, total, done
        self.began = self.shown = time.monotonic()
        self.bytes_before: int | None = None if done else 0

    def update(self, done: int, counts: dict[str, int]) -> None:
        """`done` images of the split are done in all; `counts`: passed_through, reencoded, quarantined, bytes."""

    def say(self, text: str) -> None:
        """Something that takes a while begins."""

    def rates(self, done: int, counts: dict[str, int]) -> str:
        """Images and MB a second since `start`, and the counts."""
        if self.bytes_before is None:
            self.bytes_before = counts["bytes"]
        seconds = max(time.monotonic() - self.began, 1e-9)
        return (
            f"{(done - self.done_before) / seconds:,.0f} images/s, "
            f"{(counts['bytes'] - self.bytes_before) / seconds / 1e6:,.0f} MB/s; passed {counts['passed_through']:,}, "
            f"re-encoded {counts['reencoded']:,}, quarantined {counts['quarantined']:,}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""


class _TwoLines(RichProgress):
    """The bar with count and time on one line, the rates below it: both are readable in 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['rates']}", overflow="ellipsis", no_wrap=True)


class BarProgress(Progress):
    """A bar, drawn by the converting thread itself, since that one forks."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        self._rich = _TwoLines(*columns, console=console, auto_refresh=False, expand=True)

    def start(self, split: str, total: int, done: int) -> None:
        super().start(split, total, done)
        self._rich.start()
        for task in self._rich.task_ids:
            self._rich.remove_task(task)
        self._rich.add_task(split, total=total, completed=done, rates="")

    def update(self, done: int, counts: dict[str, int]) -> None:
        for task in self._rich.task_ids:
            self._rich.update(task, completed=done, rates=self.rates(done, counts))
        if time.monotonic() - self.shown > REFRESH_S:
            self._rich.refresh()
            self.shown = time.monotonic()

    def say(self, text: str) -> None:
        self._rich.refresh()
        self._rich.console.print(text, highlight=False, markup=False)

    def __exit__(self, *_: object) -> None:
        self._rich.stop()


class LineProgress(Progress):
    """Plain lines, for logs."""

    def start(self, split: str, total: int, done: int) -> None:
        super().start(split, total, done)
        logger.info("%s: %s images%s", split, f"{total:,}", f", {done:,} of them done before" if done else "")

    def update(self, done: int, counts: dict[str, int]) -> None:
        if done == self.total or time.monotonic() - self.shown > LINE_EVERY_S:
            self.shown = time.monotonic()
            logger.info("%s: %s of %s, %s", self.split, f"{done:,}", f"{self.total:,}", self.rates(done, counts))

    def say(self, text: str) -> None:
        logger.info("%s", text)
