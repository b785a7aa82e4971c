"""How far a conversion is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
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

    def update(self, done: int, counts: dict[str, int]) -> None:
        """`done` images of the split are done in all; `counts`: passed_through, reencoded, quarantined, bytes."""

    def say(self, text: str) -> None:
        """Something that takes a while begins."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""


class _Rates:
    """Images and MB a second since `start`."""

    def start(self, done: int) -> None:
        self.began, self.done_before = time.monotonic(), done
        self.bytes_before: int | None = None

    def text(self, done: int, counts: dict[str, int]) -> str:
        if self.bytes_before is None:
            self.bytes_before = 0 if self.done_before == 0 else counts["bytes"]
        seconds = max(time.monotonic() - self.began, 1e-9)
        return (
            f"{(done - self.done_before) / seconds:,.0f} images/s, "
            f"{(counts['bytes'] - self.bytes_before) / seconds / 1e6:,.0f} MB/s; passed {counts['passed_through']:,}, "
            f"re-encoded {counts['reencoded']:,}, quarantined {counts['quarantined']:,}"
        )


class _TwoLines(RichProgress):
    """The bar with count and time on one line, the rates below it: both are readable in 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['rates']}", overflow="ellipsis", no_wrap=True)


class BarProgress(Progress):
    """A bar, drawn by the converting thread itself."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[counted]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        self._rich = _TwoLines(*columns, console=console, auto_refresh=False, expand=True)
        self._task: TaskID | None = None
        self._rates, self._drawn = _Rates(), 0.0

    def start(self, split: str, total: int, done: int) -> None:
        self._rich.start()
        self._rates.start(done)
        if self._task is not None:
            self._rich.remove_task(self._task)
        self._task = self._rich.add_task(split, total=total, completed=done, counted="", rates="")

    def update(self, done: int, counts: dict[str, int]) -> None:
        if self._task is not None:
            counted = f"{done:,} of {self._rich.tasks[0].total or 0:,.0f}"
            self._rich.update(self._task, completed=done, counted=counted, rates=self._rates.text(done, counts))
        if time.monotonic() - self._drawn > REFRESH_S:
            self._rich.refresh()
            self._drawn = time.monotonic()

    def say(self, text: str) -> None:
        self._rich.refresh()
        self._rich.console.print(text, highlight=False, markup=False)

    def __exit__(self, *_: object) -> None:
        self._rich.stop()


class LineProgress(Progress):
    """Plain lines, for logs."""

    def start(self, split: str, total: int, done: int) -> None:
        self._split, self._total, self._rates, self._said = split, total, _Rates(), time.monotonic()
        self._rates.start(done)
        logger.info("%s: %s images%s", split, f"{total:,}", f", {done:,} of them done before" if done else "")

    def update(self, done: int, counts: dict[str, int]) -> None:
        if done == self._total or time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            logger.info(
                "%s: %s of %s, %s", self._split, f"{done:,}", f"{self._total:,}", self._rates.text(done, counts)
            )

    def say(self, text: str) -> None:
        logger.info("%s", text)
