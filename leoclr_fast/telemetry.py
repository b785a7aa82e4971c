"""What a run tells while it runs: metrics to JSONL, a progress display to the terminal, and where the time goes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from leoclr_fast.distributed import Ranks

Item = TypeVar("Item")


STEP_METRICS = ("loss", "positive_similarity", "negative_similarity", "gradient_norm")


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class StepMetrics:
    """The metrics of each step, left on the device until somebody looks, so that no step waits for the host."""

    def __init__(self, ranks: Ranks, first_step: int, *, loss_is_scaled: bool = False) -> None:
        """loss_is_scaled: a gradient that overflows is then normal, its step is skipped and the scale lowered."""
        self._ranks = ranks
        self._loss_is_scaled = loss_is_scaled
        self._taken_until = first_step
        self._rows: list[Tensor] = []

    def add(self, row: Tensor) -> None:
        """What a `TrainingStep` returned."""
        self._rows.append(row)

    def take(self) -> dict[str, float]:
        """Means over the steps since the last look; of the gradient norm, over the steps where it was finite.

        Raises NonFiniteLossError, with the step, if one of their losses was not finite, or a gradient that should be.
        """
        rows = torch.stack(self._rows)
        self._rows = []
        self._ranks.all_reduce_sum([rows])
        rows = rows.cpu()
        if self._loss_is_scaled:
            norm = rows[:, STEP_METRICS.index("gradient_norm")]
            norm[~norm.isfinite()] = norm[norm.isfinite()].mean() if norm.isfinite().any() else 0.0
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            step = self._taken_until + 1 + int(bad[0])
            loss = rows[bad[0, 0], 0].item()
            raise NonFiniteLossError(f"the training became non-finite at step {step} (loss {loss})")
        self._taken_until += len(rows)
        return dict(zip(STEP_METRICS, rows.mean(dim=0).tolist(), strict=True))

    @property
    def num_steps(self) -> int:
        """Steps since the last look."""
        return len(self._rows)


class TrainingClock:
    """Seconds of training, without evaluation and checkpoints, and how many of them waited for data."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        """Finished steps when the clock was started."""
        self._start = time.perf_counter()
        self._end: float | None = None
        self._data_wait_s = 0.0
        self._paused_s = 0.0

    @property
    def training_s(self) -> float:
        """Seconds until now, or until `stop`."""
        end = time.perf_counter() if self._end is None else self._end
        return end - self._start - self._paused_s

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which the step waited for its batch."""
        return self._data_wait_s / self.training_s

    def steps_per_s(self, step: int) -> float:
        """Steps per second, when `step` steps are finished."""
        return (step - self.first_step) / self.training_s

    def stop(self) -> None:
        """Training is over."""
        self._end = time.perf_counter()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time they let us wait is data wait."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._data_wait_s += time.perf_counter() - start
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, flushed at once; any thread may write.

    `kind` is step, knn, start, end or warning, `step` counts finished steps, `unix_s` is when it was written.
    """

    def __init__(self, path: Path, enabled: bool) -> None:
        self._file = open(path, "a") if enabled else None  # noqa: SIM115 - closed by close()
        self._lock = threading.Lock()

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, **values, "unix_s": round(time.time(), 3)}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ProgressDisplay:
    """A live bar on a terminal, plain lines elsewhere, nothing on other ranks than the first."""

    def __init__(self, console: Console, total_steps: int, enabled: bool) -> None:
        self._console = console
        self._total = total_steps
        self._enabled = enabled
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total_steps)
        self._bar.start()

    def update(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Show the newest metrics: `loss`, `lr`, `images_per_s`, `data_wait_fraction`."""
        text = (
            f"epoch {epoch}  loss {metrics['loss']:.3f}  lr {metrics['lr']:.4f}  "
            f"{metrics['images_per_s']:,.0f} images/s  data wait {metrics['data_wait_fraction']:.0%}"
        )
        self._bar.update(self._task, completed=step, description=text)
        if self._enabled and not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()
