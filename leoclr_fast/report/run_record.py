"""What a run folder says about its run: everything a report shows, of runs that are whole, unfinished or damaged."""

from __future__ import annotations

import fcntl
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from dataset_tools.files import open_regular
from dataset_tools.schema import convert, read_bounded, read_json
from leoclr_fast.config import RunConfig
from leoclr_fast.config_file import as_plain, load_yaml
from leoclr_fast.report.metrics_file import Floats, MetricsFile, number
from leoclr_fast.run.documents import (
    FORMAT,
    DataDescription,
    Environment,
    Knn,
    Summary,
    read_evaluations,
)
from leoclr_fast.run.environment import boot_id
from leoclr_fast.run.folder import LOCK_NAME, RunFolder


class MethodFacts(NamedTuple):
    """The class attributes of a method that pages show, as its run logged them."""

    title: str
    num_keys: int
    """Positives of a query."""
    baseline: str
    """The name of the method that it is compared with, or ""."""


_SILENT_AFTER_S = 600.0

StateKind = Literal["finished", "paused", "stopped", "failed", "running", "killed", "unsure", "empty"]


class RunState(NamedTuple):
    """How it stands with a run: `kind` in a word, `sentence` for people."""

    kind: StateKind
    sentence: str


class Windows(NamedTuple):
    """What happened between each step record and the one before it (or the run's start); NaN where unknown."""

    seconds: Floats
    """Of training."""
    images: Floats
    wait_fraction: Floats
    """Share of the seconds in which the step waited for its batch."""

    @property
    def images_per_s(self) -> Floats:
        return self.images / self.seconds


@dataclass(kw_only=True, eq=False)
class RunRecord:
    """A run, as its folder has it. What is missing is empty, what is damaged is empty and named in `problems`."""

    path: Path
    label: str = "this run"
    """What a page calls it."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: Environment = field(default_factory=Environment)
    summary: Summary = field(default_factory=Summary)
    data: DataDescription = field(default_factory=DataDescription)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    metrics: MetricsFile
    is_being_written: bool = False
    """Whether a process held the folder just before or just after its files were read."""
    problems: list[str] = field(default_factory=list)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration: `result.method.name`."""
        value: Any = self.config
        for key in dotted.split("."):
            if key not in value:
                return default
            value = value[key]
        return value

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe", "unknown recipe"))

    @property
    def method(self) -> str:
        return str(self.setting("result.method.name", "unknown method"))

    @cached_property
    def method_facts(self) -> MethodFacts:
        """A run of before, or one that never started, did not log them: then its class has them, if there is one."""
        start = self.metrics.starts[-1] if self.metrics.starts else None
        if start is None or start.num_keys is None:
            from leoclr_fast.method.methods import METHODS  # imports torch

            found = METHODS.get(self.method)
            if found is not None:
                return MethodFacts(found.title, len(found.views) - 1, found.baseline)
        if start is None:
            return MethodFacts(self.method, 1, "")
        return MethodFacts(start.method or self.method, start.num_keys or 1, start.baseline)

    @property
    def synthetic(self) -> bool:
        """Whether the run measured speed on noise."""
        return bool(self.setting("speed.loader.name") == "synthetic")

    @property
    def batch_size(self) -> float:
        return number(self.setting("result.batch_size"))

    @property
    def steps_per_epoch(self) -> float:
        """NaN if the log does not say."""
        return number(self.metrics.starts[-1].steps_per_epoch if self.metrics.starts else None)

    @property
    def total_steps(self) -> float:
        """Of all epochs; NaN if nothing in the folder says."""
        return number(self.setting("result.epochs")) * self.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        return self.metrics.last_step / self.steps_per_epoch

    @property
    def keys_per_image(self) -> int:
        """How many keys of an image enter the queue."""
        return self.method_facts.num_keys if self.setting("result.method.enqueue") == "all" else 1

    @property
    def queue_full_at_step(self) -> int | None:
        """The step until which random vectors are among the negatives: K keys, B (or B P) of them a step."""
        steps = number(self.setting("result.method.queue_size")) / (self.keys_per_image * self.batch_size)
        return math.ceil(steps) if math.isfinite(steps) else None

    @property
    def images_per_s(self) -> float:
        """Of training, without evaluation and checkpoints, since the run was last started; NaN if not logged."""
        return self._overall("images_per_s")

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which the step waited for its batch, since the run was last started."""
        return self._overall("data_wait_fraction")

    @property
    def duration_s(self) -> float:
        """Seconds that the run took, of training alone where the log has no times; NaN if nothing was logged."""
        return self.metrics.wall_s if math.isfinite(self.metrics.wall_s) else self.training_s

    @property
    def training_s(self) -> float:
        """Seconds of training alone; NaN if nothing was logged."""
        return float(np.nansum(self.windows.seconds)) if self.metrics.num_steps else math.nan

    @property
    def knn(self) -> Knn | None:
        """The newest kNN record."""
        return self.metrics.knn[-1] if self.metrics.knn else None

    @property
    def knn_top1(self) -> float:
        """Percent; NaN if there is none."""
        return number(self.knn.top1 if self.knn else None)

    @property
    def knn_untrained(self) -> Knn | None:
        """The kNN record from before the first step."""
        return self.metrics.knn[0] if self.metrics.knn and self.metrics.knn[0].step == 0 else None

    @property
    def energy_kwh(self) -> float:
        """What was measured, as `energy_kwh` in summary.json; NaN where it was not."""
        return number(self.summary.energy_kwh)

    @property
    def windows(self) -> Windows:
        """Between each step record and the one before it.

        The log holds means since the start; the seconds since then are images / (images/s).
        """
        step, segment = self.metrics.column("step"), self.metrics.column("segment")
        # The step that each segment continued from; -1, before any start record, is the last entry: step 0.
        first = np.array([start.step for start in self.metrics.starts] + [0.0])[segment.astype(np.int64)]
        images = (step - first) * self.batch_size
        seconds = images / self.metrics.column("images_per_s")
        between = _differences(seconds, segment)
        waited = _differences(seconds * self.metrics.column("data_wait_fraction"), segment)
        return Windows(between, _differences(images, segment), np.clip(waited / between, 0, 1))

    def _overall(self, name: str) -> float:
        found = number(getattr(self.summary, name))
        if self.summary.steps == self.metrics.last_step and math.isfinite(found):
            return found
        return self.metrics.last.get(name, math.nan)

    @property
    def state(self) -> RunState:
        """Finished, stopped, failed, killed, still running …: from the last start or end record, and the lock."""
        metrics, at = self.metrics, self._place()
        if metrics.last_mark == "end":
            end = metrics.ends[-1]
            reason = end.reason or ""
            ended = reason if reason.endswith((".", "!", "?")) else f"{reason or 'no reason was given'}."
            match end.status:
                case "finished":
                    return RunState("finished", f"Finished {at}.")
                case "paused":
                    return RunState("paused", f"Paused {at}: {reason or 'not all steps were asked for'}.")
                case "stopped":
                    return RunState("stopped", f"Stopped {at}: {ended}")
                case status:
                    where = f" In {end.where}." if end.where else ""
                    word = "Failed" if status == "failed" else f"Ended ({status})"
                    return RunState("failed", f"{word} {at}: {ended}{where}")
        if metrics.last_mark == "" and self.summary.steps is not None and self.summary.steps >= metrics.last_step:
            if self.summary.complete:
                return RunState("finished", f"Finished {at}.")
            return RunState("paused", f"Paused {at}: not all steps were asked for.")
        if self.is_being_written:
            return RunState("running", f"Running, {at}.")
        if not metrics.num_steps and not metrics.starts and not metrics.knn:
            return RunState("empty", "Nothing was logged in this folder yet.")
        newest_s = metrics.last_unix_s if math.isfinite(metrics.last_unix_s) else metrics.path.stat().st_mtime
        since = f"the last record is of {when(newest_s)}"
        started_on = metrics.starts[-1].boot_id if metrics.starts else None
        here = started_on is not None and started_on == boot_id()
        if not here and time.time() - newest_s < _SILENT_AFTER_S:
            return RunState("unsure", f"Running on another machine, or killed, {at}: {since}.")
        return RunState("killed", f"Killed in the middle, {at}: it left no word of its end; {since}.")

    def _place(self) -> str:
        step = self.metrics.last_step
        if not math.isfinite(self.total_steps):
            return f"after step {step:,}"
        epochs = self.setting("result.epochs")
        return f"after step {step:,} of {self.total_steps:,.0f} (epoch {self.epochs_done:.4g} of {epochs})"

    @property
    def seconds_left(self) -> float:
        """Until the last epoch's end at the speed so far, evaluation not counted; NaN if not known."""
        if self.state.kind not in ("running", "unsure") or not self.images_per_s > 0:
            return math.nan
        return max(0.0, self.total_steps - self.metrics.last_step) * self.batch_size / self.images_per_s

    def snapshot(self) -> dict[str, Any]:
        """The newest values as one JSON document; what is not known is NaN, in JSON null."""
        return {
            "run": str(self.path),
            "state": self.state.kind,
            "step": self.metrics.last_step,
            "total_steps": self.total_steps,
            "loss": self.metrics.last.get("loss", math.nan),
            "knn_top1": self.knn_top1,
            "images_per_s": self.images_per_s,
            "data_wait_fraction": self.data_wait_fraction,
            "seconds_left": self.seconds_left,
        }

    def notes(self) -> list[str]:
        """What a reader must know about the record itself: what is missing, damaged, newer or thinned."""
        metrics = self.metrics
        lines = list(self.problems)
        if metrics.format > FORMAT:
            lines.append(
                f"A newer version wrote this log (format {metrics.format}, this program reads {FORMAT}): what "
                "this one knows is shown, the rest is left out. Update leoclr-fast to see all of it."
            )
        if metrics.unknown_kinds:
            lines.append(f"Records of kinds this program does not know: {', '.join(sorted(metrics.unknown_kinds))}.")
        if not metrics.path.is_file():
            lines.append("There is no metrics.jsonl, so there are no curves.")
        elif not metrics.num_steps:
            lines.append("No step is logged yet, so there are no curves.")
        if metrics.num_damaged_lines:
            lines.append(f"{_count(metrics.num_damaged_lines, 'line')} of metrics.jsonl could not be read.")
        if metrics.half_line:
            lines.append("The last line of metrics.jsonl is cut off; it is left out.")
        for name in ("loss", "gradient_norm", *metrics.metric_names):
            bad = ~np.isfinite(metrics.column(name))
            if bad.any():
                first = int(metrics.column("step")[bad][0])
                lines.append(
                    f"{name} is missing or not finite in {_count(int(bad.sum()), 'record')}, first at step {first:,}: "
                    "a gap in its curve."
                )
        return lines


def read_run(path: Path) -> RunRecord:
    """The run in a folder. Raises FileNotFoundError if there is no folder or nothing of a run in it."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a run folder: there is no such folder; give the --out of a pretrain")
    if not folder.exists() and not folder.metrics_file.exists():
        raise FileNotFoundError(
            f"{path} is not a run folder: it has neither config.yaml nor metrics.jsonl; give the --out of a pretrain"
        )
    record = RunRecord(path=path, metrics=MetricsFile(path=folder.metrics_file))
    refresh(record)
    return record


def refresh(record: RunRecord) -> bool:
    """Read what the run has written since; whether it has logged anything."""
    folder, problems = RunFolder(record.path), list[str]()
    was_locked = _is_locked(record.path)  # asked first: a run that ends while its log is read was not killed
    changed = record.metrics.update()
    if not folder.exists():
        problems.append(f"{folder.config_file} is missing: the configuration is not known.")
    record.config = _read_config(folder, problems)
    record.environment = _read(folder.environment_file, Environment, problems)
    record.summary = _read(folder.summary_file, Summary, problems)
    record.data = _read(folder.data_file, DataDescription, problems)
    record.evaluations = read_evaluations(folder.evaluations_file, problems)
    record.problems = problems
    record.is_being_written = was_locked or _is_locked(record.path)  # or it began while its log was read
    return changed


def when(unix_s: float) -> str:
    """A time in words, in this machine's zone: 2026-05-01 14:03:21 UTC+02:00."""
    if not math.isfinite(unix_s):
        return "an unknown time"
    now = time.localtime(unix_s)
    zone = time.strftime("%z", now)
    return time.strftime("%Y-%m-%d %H:%M:%S", now) + f" UTC{zone[:3]}:{zone[3:]}"


def duration(seconds: float) -> str:
    """A duration in the unit people would use: 53.2 hours, 2.1 minutes, 41 seconds."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _read_config(folder: RunFolder, problems: list[str]) -> dict[str, Any]:
    """The configuration: fields that it did not have yet have their defaults. Empty where there is none."""
    if not folder.exists():
        return {}
    try:
        document = load_yaml(read_bounded(folder.config_file), str(folder.config_file))
        return as_plain(convert(document, RunConfig, str(folder.config_file)))
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return {}


Document = TypeVar("Document")


def _read(path: Path, kind: type[Document], problems: list[str]) -> Document:
    """A file of the run, without content where there is none; where it cannot be read, that is a problem."""
    try:
        return read_json(path, kind) if path.exists() else kind()
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return kind()


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine (or of one that shares its locks) is writing to the run."""
    try:
        with open_regular(path / LOCK_NAME) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _differences(since_start: Floats, segment: Floats) -> Floats:
    """Of what adds up since each start; NaN where it does not grow."""
    before = np.concatenate([[0.0], since_start[:-1]])[: len(since_start)]
    before[1:][segment[1:] != segment[:-1]] = 0.0
    difference = since_start - before
    return np.where(difference > 0, difference, np.nan)


def _count(how_many: int, noun: str) -> str:
    return f"{how_many:,} {noun}{'s' if how_many != 1 else ''}"
