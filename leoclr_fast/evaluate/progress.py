"""How far an evaluation's training is: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from leoclr_fast.run.telemetry import TrainingClock

_LINE_EVERY_S = 5.0


class EvaluationProgress:
    """Shown by the first rank alone."""

    def __init__(self, console: Console | None, total_steps: int, *, enabled: bool) -> None:
        self._console = console or Console()
        self._total, self._enabled = total_steps, enabled
        self._last_line = float("-inf")
        columns = (TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        live = enabled and self._console.is_terminal
        self._bar = Progress(*columns, *times, console=self._console, disable=not live)
        self._task = self._bar.add_task("", total=total_steps)
        self._bar.start()

    def update(self, step: int, epoch: int, loss: float, lr: float, batch_size: int, clock: TrainingClock) -> None:
        """An epoch (counted from 0) ended after `step` steps in all, with this mean loss."""
        text = (
            f"epoch {epoch + 1}  loss {loss:.3f}  lr {lr:.4g}  {clock.steps_per_s(step) * batch_size:,.0f} images/s  "
            f"data wait {clock.data_wait_fraction:.0%}"
        )
        self._bar.update(self._task, completed=step, description=text)
        due = step == self._total or time.monotonic() - self._last_line > _LINE_EVERY_S
        if due and self._enabled and not self._console.is_terminal:
            self.say(f"step {step:,}/{self._total:,}  {text}")
            self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
