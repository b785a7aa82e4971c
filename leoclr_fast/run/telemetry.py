"""What a run tells while it runs: metrics to JSONL, a progress display to the terminal, and where the time goes."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dataset_tools.files import open_own
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.run.trackers import Tracker

Item = TypeVar("Item")


MAX_STEPS_AHEAD = 4
"""Steps that the host may have enqueued and a GPU not finished."""
MAX_OVERFLOWS_IN_A_ROW = 25
"""Steps in fp16 that may be skipped one after another: the loss scale, 65,536 at first, is below 0.01 then."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class StepMetrics:
    """The metrics of each step. They stay on the device, are sent to the host now and then, and are read when they
    have arrived, so that neither side waits for the other.
    """

    def __init__(self, ranks: Ranks, first_step: int, names: Sequence[str], *, loss_is_scaled: bool = False) -> None:
        """names: of the metrics, the loss first, the norm of its gradient last.

        loss_is_scaled: a gradient that overflows is then normal, its step is skipped and the scale lowered."""
        self._ranks = ranks
        self._names = names
        self._loss_is_scaled = loss_is_scaled
        self._read_until = first_step
        self._overflows_in_a_row = 0
        self._rows: list[Tensor] = []
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = deque()
        self._num_read = 0
        self._unfinished_steps: deque[torch.cuda.Event] = deque()

    def add(self, row: Tensor) -> None:
        """What a `TrainingStep` returned. Waits for the step of a while ago, so that the host does not run away."""
        self._rows.append(row)
        if row.is_cuda:
            self._unfinished_steps.append(_event())
            if len(self._unfinished_steps) > MAX_STEPS_AHEAD:
                self._unfinished_steps.popleft().synchronize()

    def send(self, **context: Any) -> None:
        """Start the way to the host for all that was added since the last time. context: comes back with the means."""
        rows = torch.stack(self._rows)
        self._rows = []
        self._ranks.all_reduce_sum([rows])
        if not rows.is_cuda:
            self._sent.append((rows, None, context))
            return
        on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._sent.append((on_host, _event(), context))

    @property
    def num_arrived(self) -> int:
        """How many of all that were ever sent are on the host."""
        number = self._num_read
        for _, event, _ in self._sent:
            if event is not None and not event.query():
                break
            number += 1
        return number

    def arrived(self, up_to: int | None = None, *, wait: bool = False) -> Iterator[dict[str, Any]]:
        """For each `send` that has arrived, in order: its context and the means over its steps; of the gradient norm,
        over the steps where it was finite. up_to: how many of all that were ever sent, all that have arrived if not
        given; the same on all ranks, so that they see the same at the same step. wait: for all that were sent.

        Raises NonFiniteLossError, with the step, if one of their losses was not finite, or a gradient that should be,
        or too many gradients in a row of a loss that is scaled.
        """
        limit = self.num_arrived if up_to is None else up_to
        while self._sent and (wait or self._num_read < limit):
            rows, event, context = self._sent.popleft()
            if event is not None:
                event.synchronize()
            self._num_read += 1
            yield context | self._means(rows)

    @property
    def num_steps(self) -> int:
        """Steps that were added and not yet sent."""
        return len(self._rows)

    def _means(self, rows: Tensor) -> dict[str, float]:
        first_step = self._read_until + 1
        self._read_until += len(rows)
        if self._loss_is_scaled:
            norm = rows[:, -1]
            for number, finite in enumerate(norm.isfinite().tolist()):
                self._overflows_in_a_row = 0 if finite else self._overflows_in_a_row + 1
                if self._overflows_in_a_row == MAX_OVERFLOWS_IN_A_ROW:
                    raise NonFiniteLossError(
                        f"the gradients of {MAX_OVERFLOWS_IN_A_ROW} steps in a row, the last of them step "
                        f"{first_step + number}, overflowed in fp16, although each halved the loss scale"
                    )
            norm[~norm.isfinite()] = norm[norm.isfinite()].mean() if norm.isfinite().any() else 0.0
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            loss = rows[bad[0, 0], 0].item()
            raise NonFiniteLossError(f"the training became non-finite at step {first_step + int(bad[0])} (loss {loss})")
        return dict(zip(self._names, rows.mean(dim=0).tolist(), strict=True))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


class TrainingClock:
    """Seconds of training, without evaluation and checkpoints, and how many of them waited for data."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        """Finished steps when the clock was started."""
        self._start = time.perf_counter()
        self._end: float | None = None
        self.data_wait_s = 0.0
        """Seconds in which the step waited for its batch."""
        self._paused_s = 0.0
        self._lap_step, self._lap_s = first_step, 0.0

    @property
    def training_s(self) -> float:
        """Seconds until now, or until `stop`."""
        end = time.perf_counter() if self._end is None else self._end
        return end - self._start - self._paused_s

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which the step waited for its batch."""
        return self.data_wait_s / self.training_s

    def steps_per_s(self, step: int) -> float:
        """Steps per second, when `step` steps are finished."""
        return (step - self.first_step) / self.training_s

    def lap(self, step: int) -> float:
        """Steps per second since the last lap, when `step` steps are finished."""
        now_s = self.training_s
        rate = (step - self._lap_step) / (now_s - self._lap_s)
        self._lap_step, self._lap_s = step, now_s
        return rate

    def stop(self) -> None:
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
                self.data_wait_s += time.perf_counter() - start
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

    def __init__(self, path: Path, enabled: bool, trackers: Sequence[Tracker] = ()) -> None:
        """trackers: they get the numbers of steps and of kNN, too."""
        self._file = open_own(path, "a") if enabled else None
        self._lock = threading.Lock()
        self._trackers = list(trackers)

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, **values, "unix_s": round(time.time(), 3)}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
        if kind in ("step", "knn"):
            numbers = {f"{kind}/{name}": float(value) for name, value in values.items() if name != "step"}
            for tracker in self._trackers:
                tracker.log(values["step"], numbers)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


class ProgressDisplay:
    """A live bar on a terminal, plain lines elsewhere, nothing on other ranks than the first."""

    def __init__(self, console: Console, total_steps: int, enabled: bool, line_every_s: float = 0.0) -> None:
        """line_every_s: between two plain lines, but for the last one."""
        self._console = console
        self._line_every_s, self._last_line_s = line_every_s, float("-inf")
        self._total = total_steps
        self._enabled = enabled
        self._bar = Progress(
            TextColumn("step", style="bold"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total_steps)
        self._bar.start()

    def update(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Show the newest metrics: `loss`, `lr`, `images_per_s_now`, `data_wait_fraction`, `seconds_left`, and, where
        they are known, `mfu`, `gpu_memory_gib` and `gpu_power_w`."""
        parts = [
            f"epoch {epoch}  loss {metrics['loss']:.3f}  lr {metrics['lr']:.4g}",
            f"{metrics['images_per_s_now']:,.0f} images/s",
            f"data wait {metrics['data_wait_fraction']:.0%}",
        ]
        for name, shown in (("mfu", "MFU {:.0%}"), ("gpu_memory_gib", "{:.1f} GiB"), ("gpu_power_w", "{:.0f} W")):
            if name in metrics:
                parts.append(shown.format(metrics[name]))
        text = "  ".join(parts)
        self._bar.update(self._task, completed=step, description=text)
        due = step == self._total or time.monotonic() - self._last_line_s >= self._line_every_s
        if due and self._enabled and not self._console.is_terminal:
            self._last_line_s = time.monotonic()
            left = timedelta(seconds=round(metrics["seconds_left"]))
            self._console.print(f"step {step}/{self._total}  {text}  {left} left", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()
