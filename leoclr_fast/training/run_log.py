"""What a run leaves for its readers: when and why it started and ended, its warnings, its views, its report."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import leoclr_fast
from dataset_tools.command_line import PACKAGES
from dataset_tools.files import open_regular
from dataset_tools.sources import ImageSource, Split
from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError
from leoclr_fast.report.metrics_file import MetricsFile
from leoclr_fast.run.documents import FORMAT, LeftOut, read_line
from leoclr_fast.run.environment import boot_id
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.run.preview import write_preview
from leoclr_fast.run.telemetry import MetricsLog
from leoclr_fast.training.state import TrainingState
from pipelines.config import ViewConfig
from pipelines.order import TrainOrder
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)

_PREVIEW_ROWS = 4
_MAX_LISTED = 100
_MAX_REPORT_SHARE = 0.05


class RunLog:
    """Of the first rank; on the others it does nothing.

    None of it can harm the run: what cannot be written is a warning.
    """

    def __init__(
        self, folder: RunFolder, metrics_log: MetricsLog, training: TrainingState, total_steps: int, *, enabled: bool
    ) -> None:
        self._folder = folder
        self._metrics_log = metrics_log
        self._training = training
        self._total_steps = total_steps
        self._enabled = enabled
        self._next_report = 0.0

    @contextmanager
    def kept(self, last_step: int, steps_per_epoch: int, world_size: int) -> Iterator[None]:
        """A start record now, an end record and the report when this is left, in whatever way; warnings in between.

        A run that has nothing left to do and whose end is logged is left as it is.
        """
        if not self._enabled:
            yield
            return
        if self._training.step >= last_step and self._end_is_logged():
            yield
            self._write_report()
            return
        self._metrics_log.write(
            "start",
            step=self._training.step,
            method=self._training.method.title,
            num_keys=len(self._training.method.views) - 1,
            baseline=self._training.method.baseline,
            metrics=self._training.method.metric_names,
            format=FORMAT,
            steps_per_epoch=steps_per_epoch,
            last_step=last_step,
            world_size=world_size,
            boot_id=boot_id(),
        )
        warnings = _WarningsToLog(self._metrics_log, self._training)
        loggers = [logging.getLogger(package) for package in PACKAGES]
        for logger in loggers:
            logger.addHandler(warnings)
        try:
            yield
        except BaseException as error:
            self._end(**_reason(error))
            raise
        else:
            complete = self._training.step >= self._total_steps
            if complete:
                self._end(status="finished")
            else:
                self._end(status="paused", reason=f"--max-steps {self._training.step:,}")
        finally:
            for logger in loggers:
                logger.removeHandler(warnings)

    def describe_data(
        self, source: ImageSource, split: Split, note: str, views: ViewRecipe, config: ViewConfig, seed: int
    ) -> None:
        """`data.json` and `preview.png`, so that a report shows them without the data being there."""
        if not self._enabled or (self._folder.data_file.exists() and self._folder.preview_file.exists()):
            return
        with _harmless("describe the data for the report"):
            rows = min(_PREVIEW_ROWS, len(split))
            shown = TrainOrder(num_images=len(split), batch_size=rows, seed=seed).indices(0, 0)
            document = {
                "path": str(source.path),
                "kind": source.kind,
                "fingerprint": source.fingerprint,
                "split": split.name,
                "images": len(split),
                "classes": list(source.classes[:_MAX_LISTED]),
                "num_classes": len(source.classes),
                "note": note,
                "quarantined": _quarantined(source.path),
                "preview": [
                    {
                        "name": split.names[index],
                        "class": split.classes[split.labels[index]] if split.labels[index] >= 0 else None,
                    }
                    for index in shown.tolist()
                ],
            }
            write_json(self._folder.data_file, document)
            write_preview(self._folder.preview_file, split, views, config, seed=seed, rows=rows)

    def write(self, kind: str, **values: Any) -> None:
        """A record of `metrics.jsonl`."""
        self._metrics_log.write(kind, **values)

    def report(self) -> None:
        """Write `report.html`, unless that would take more than a twentieth of the time since the last one."""
        if self._enabled and time.perf_counter() >= self._next_report:
            self._write_report()

    def _end_is_logged(self) -> bool:
        metrics = MetricsFile(path=self._folder.metrics_file)
        metrics.update()
        return metrics.last_mark != "start"

    def _end(self, **values: Any) -> None:
        with _harmless("record the end of the run"):
            self._metrics_log.write("end", step=self._training.step, **values)
        self._write_report()

    def _write_report(self) -> None:
        start = time.perf_counter()
        with _harmless("write the report"):
            from leoclr_fast.report.page import write_report  # matplotlib: only where a report is written

            write_report([self._folder.path], self._folder.report_file)
        end = time.perf_counter()
        self._next_report = end + (end - start) / _MAX_REPORT_SHARE


class _WarningsToLog(logging.Handler):
    """Warnings of the run as records of its log."""

    def __init__(self, metrics_log: MetricsLog, training: TrainingState) -> None:
        super().__init__(logging.WARNING)
        self._metrics_log = metrics_log
        self._training = training

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._metrics_log.write("warning", step=self._training.step, text=record.getMessage())
        except (OSError, ValueError):
            self.handleError(record)


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Whatever goes wrong in here is a warning, and the run goes on."""
    try:
        yield
    except Exception as error:
        log.warning("cannot %s: %s: %s", what, type(error).__name__, error)


def _reason(error: BaseException) -> dict[str, Any]:
    """Status, reason and place of an end that was not the plan."""
    if isinstance(error, StoppedBySignalError | StoppedAtOnce):
        return {"status": "stopped", "reason": str(error)}
    if isinstance(error, KeyboardInterrupt):
        return {"status": "stopped", "reason": "interrupted at once, without a checkpoint"}
    reason = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
    return {"status": "failed", "reason": reason, "where": _where(error.__traceback__)}


def _where(trace: TracebackType | None) -> str | None:
    """The innermost line of ours: `_log_metrics, leoclr_fast/training/loop.py line 271`."""
    root = Path(leoclr_fast.__file__).parents[1]
    for frame in reversed(traceback.extract_tb(trace)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in PACKAGES:
            return f"{frame.name}, {path.relative_to(root)} line {frame.lineno}"
    return None


def _quarantined(data: Path) -> dict[str, Any]:
    """How many images the conversion of `data` left out, and why the first of them were."""
    path = data / "quarantine.jsonl"
    if not data.is_dir() or not path.is_file():
        return {"images": 0, "listed": []}
    listed: list[dict[str, Any]] = []
    number = 0
    with open_regular(path) as lines:
        for number, line in enumerate(lines, start=1):
            if len(listed) < _MAX_LISTED:
                entry = read_line(line, LeftOut, f"line {number} of {path}")
                listed.append({"name": entry["name"], "reason": entry["reason"]})
    return {"images": number, "listed": listed}
