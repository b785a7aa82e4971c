"""What a run folder says about its run: everything a report shows, read without any trust in it being whole."""

from __future__ import annotations

import fcntl
import json
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from leoclr_fast.report.metrics_file import FORMAT, Floats, MetricsFile
from leoclr_fast.report.values import number, positive
from leoclr_fast.run.environment import boot_id
from leoclr_fast.run.folder import LOCK_NAME, RunFolder

METHOD_TITLES = {"leoclr": "LeOCLR", "mocov2": "MoCo-v2"}
_SILENT_AFTER_S = 600.0

StateKind = Literal["finished", "paused", "stopped", "failed", "running", "killed", "unsure", "empty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How it stands with a run: `kind` in a word, `sentence` for people."""

    kind: StateKind
    sentence: str

    @property
    def ended_badly(self) -> bool:
        return self.kind in ("failed", "killed")


@dataclass(kw_only=True, eq=False)
class RunRecord:
    """A run, as its folder tells it. What is missing is empty, what is damaged is empty and named in `problems`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """`data.json`: path, fingerprint, images, classes, quarantined, views."""
    loader_bench: dict[str, Any] = field(default_factory=dict)
    """What `bench loader --run` has measured."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    metrics: MetricsFile
    is_being_written: bool = False
    """Whether a process held the folder just before or just after its files were read."""
    problems: list[str] = field(default_factory=list)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration: `result.method.name`."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe") or "unknown recipe")

    @property
    def method(self) -> str:
        """leoclr, mocov2, or what a newer version calls it."""
        return str(self.setting("result.method.name", "unknown method"))

    @property
    def method_title(self) -> str:
        return METHOD_TITLES.get(self.method, self.method)

    @property
    def synthetic(self) -> bool:
        """Whether the run measured speed on noise."""
        return bool(self.setting("speed.loader.name") == "synthetic")

    @property
    def batch_size(self) -> float:
        return positive(self.setting("result.batch_size"))

    @cached_property
    def steps_per_epoch(self) -> float:
        """NaN if nothing in the folder tells."""
        for start in reversed(self.metrics.starts):
            if (steps := positive(start.get("steps_per_epoch"))) > 0:
                return steps
        for record in [*self.metrics.knn, {"step": self.summary.get("steps"), "epoch": self.summary.get("epochs")}]:
            step, epoch = positive(record.get("step")), positive(record.get("epoch"))
            if step > 0 and epoch > 0:
                return float(round(step / epoch))
        return math.nan

    @property
    def total_steps(self) -> float:
        """Of all epochs; NaN if nothing in the folder tells."""
        return positive(self.setting("result.epochs")) * self.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        return self.metrics.last_step / self.steps_per_epoch

    @property
    def queue_full_at_step(self) -> int | None:
        """The step until which random vectors are among the negatives: K keys, B (or B P) of them a step."""
        size, per_step = positive(self.setting("result.method.queue_size")), self.batch_size
        if self.setting("result.method.enqueue") == "all" and self.method == "leoclr":
            per_step *= 2
        return math.ceil(size / per_step) if size > 0 and per_step > 0 else None

    @property
    def images_per_s(self) -> float:
        """Of training, without evaluation and checkpoints, since the run was last started; NaN if not logged."""
        return self._overall("images_per_s")

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which the step waited for its batch, since the run was last started."""
        return self._overall("data_wait_fraction")

    @property
    def wall_s(self) -> float:
        """Hours of the run in seconds, evaluation and checkpoints included; NaN where the log has no times."""
        return self.metrics.wall_s

    @property
    def training_s(self) -> float:
        """Seconds of training alone; NaN if nothing was logged."""
        seconds = self.window_seconds
        return float(np.nansum(seconds)) if len(seconds) else math.nan

    @property
    def knn(self) -> dict[str, Any]:
        """The newest kNN record; empty if there is none."""
        return self.metrics.knn[-1] if self.metrics.knn else {}

    @property
    def knn_top1(self) -> float:
        """Percent; NaN if there is none."""
        return number(self.knn.get("top1"))

    @property
    def knn_top1_untrained(self) -> float:
        """Percent, before the first step; NaN if there is none."""
        first = self.metrics.knn[0] if self.metrics.knn else {}
        return number(first.get("top1")) if first.get("step") == 0 else math.nan

    @property
    def energy_kwh(self) -> float:
        """What was measured, as `energy_kwh` in summary.json; NaN where it was not."""
        return number(self.summary.get("energy_kwh"))

    @property
    def unreadable_images(self) -> dict[str, str]:
        """Name → reason, as far as the run told."""
        unreadable = self.summary.get("unreadable_images")
        return {str(name): str(why) for name, why in unreadable.items()} if isinstance(unreadable, dict) else {}

    @property
    def window_seconds(self) -> Floats:
        """Training seconds between each step record and the one before it (or the run's start); NaN if unknown.

        The log holds means since the start; the seconds since then are images / (images/s).
        """
        step, segment = self.metrics.column("step"), self.metrics.column("segment")
        since_start = (step - self._first_steps(segment)) * self.batch_size / self.metrics.column("images_per_s")
        return _per_window(since_start, segment)

    @property
    def window_images(self) -> Floats:
        """Images between each step record and the one before it (or the run's start)."""
        step, segment = self.metrics.column("step"), self.metrics.column("segment")
        return _per_window((step - self._first_steps(segment)) * self.batch_size, segment)

    @property
    def window_wait_fraction(self) -> Floats:
        """Data wait between each step record and the one before it, as a share of the time; NaN if unknown."""
        step, segment = self.metrics.column("step"), self.metrics.column("segment")
        since_start = (step - self._first_steps(segment)) * self.batch_size / self.metrics.column("images_per_s")
        waited = _per_window(since_start * self.metrics.column("data_wait_fraction"), segment)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(waited / self.window_seconds, 0, 1)

    def _first_steps(self, segment: Floats) -> Floats:
        """The step that the segment of each record continued from."""
        starts = np.array([number(start.get("step")) for start in self.metrics.starts] + [0.0])
        return starts[segment.astype(np.int64)]  # -1, before any start record, is the last entry: step 0

    def _overall(self, name: str) -> float:
        if self.summary.get("steps") == self.metrics.last_step and math.isfinite(number(self.summary.get(name))):
            return number(self.summary[name])
        return self.metrics.last.get(name, math.nan)

    @property
    def state(self) -> RunState:
        """Finished, stopped, failed, killed, still running …: from the last start or end record, and the lock."""
        metrics, at = self.metrics, self._place()
        if metrics.last_mark == "end":
            end = metrics.ends[-1]
            reason = str(end.get("reason") or "")
            match end.get("status"):
                case "finished":
                    return RunState(kind="finished", sentence=f"Finished {at}.")
                case "paused":
                    return RunState(kind="paused", sentence=f"Paused {at}: {reason or 'not all steps were asked for'}.")
                case "stopped":
                    return RunState(kind="stopped", sentence=f"Stopped {at}: {_ended(reason)}")
                case status:
                    where = f" In {end['where']}." if end.get("where") else ""
                    word = "Failed" if status == "failed" else f"Ended ({status})"
                    return RunState(kind="failed", sentence=f"{word} {at}: {_ended(reason)}{where}")
        if metrics.last_mark == "" and self.summary and number(self.summary.get("steps")) >= metrics.last_step:
            if self.summary.get("complete"):
                return RunState(kind="finished", sentence=f"Finished {at}.")
            return RunState(kind="paused", sentence=f"Paused {at}: not all steps were asked for.")
        if self.is_being_written:
            return RunState(kind="running", sentence=f"Running, {at}.")
        if not metrics.num_steps_kept and not metrics.starts and not metrics.knn:
            return RunState(kind="empty", sentence="Nothing was logged in this folder yet.")
        since = f"the last record is of {when(self.last_sign_unix_s)}"
        started = metrics.starts[-1] if metrics.starts else {}
        here = started.get("boot_id") is not None and started.get("boot_id") == boot_id()
        if not here and time.time() - self.last_sign_unix_s < _SILENT_AFTER_S:
            sentence = f"Running on another machine, or killed, {at}: {since}."
            return RunState(kind="unsure", sentence=sentence)
        sentence = f"Killed in the middle, {at}: it left no word of its end; {since}."
        return RunState(kind="killed", sentence=sentence)

    @property
    def last_sign_unix_s(self) -> float:
        """When the newest record was written, else when the log was last changed, else 0."""
        if math.isfinite(self.metrics.last_unix_s):
            return self.metrics.last_unix_s
        try:
            return self.metrics.path.stat().st_mtime
        except OSError:
            return 0.0

    def _place(self) -> str:
        step = self.metrics.last_step
        if not math.isfinite(self.total_steps):
            return f"after step {step:,}"
        epochs = self.setting("result.epochs")
        return f"after step {step:,} of {self.total_steps:,.0f} (epoch {self.epochs_done:.4g} of {epochs})"

    def notes(self) -> list[str]:
        """What a reader must know about the record itself: what is missing, damaged, newer or thinned."""
        metrics = self.metrics
        lines = list(self.problems)
        if metrics.newest_format > FORMAT:
            lines.append(
                f"A newer version wrote this log (format {metrics.newest_format}, this program reads {FORMAT}): what "
                "this one knows is shown, the rest is left out. Update leoclr-fast to see all of it."
            )
        if metrics.unknown_kinds:
            lines.append(f"Records of kinds this program does not know: {', '.join(sorted(metrics.unknown_kinds))}.")
        if not metrics.exists:
            lines.append("There is no metrics.jsonl, so there are no curves.")
        elif not metrics.num_steps_kept:
            lines.append("No step is logged yet, so there are no curves.")
        if metrics.num_damaged_lines:
            lines.append(f"{_count(metrics.num_damaged_lines, 'line')} of metrics.jsonl could not be read.")
        if metrics.half_line:
            lines.append("The last line of metrics.jsonl is cut off; it is left out.")
        for name in ("loss", "gradient_norm", "positive_similarity", "negative_similarity"):
            bad = ~np.isfinite(metrics.column(name))
            if bad.any():
                first = int(metrics.column("step")[bad][0])
                lines.append(
                    f"{name} is missing or not finite in {_count(int(bad.sum()), 'record')}, first at step {first:,}: "
                    "a gap in its curve."
                )
        if metrics.num_step_records > metrics.num_steps_kept + 1 and metrics.num_steps_kept:
            lines.append(
                f"The log has {metrics.num_step_records:,} step records; {metrics.num_steps_kept:,} of them, evenly "
                "chosen, were read."
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
    record.config = _read(record, folder.config_file, yaml.safe_load)
    refresh(record)
    return record


def refresh(record: RunRecord) -> bool:
    """Read what the run has written since; whether it has logged anything."""
    folder = RunFolder(record.path)
    was_locked = _is_locked(record.path)  # asked first: a run that ends while its log is read was not killed
    changed = record.metrics.update()
    record.problems = [line for line in record.problems if line.startswith(str(folder.config_file))]
    record.environment = _read(record, folder.environment_file, json.loads)
    record.summary = _read(record, folder.summary_file, json.loads)
    record.data = _read(record, folder.data_file, json.loads)
    record.loader_bench = _read(record, folder.loader_bench_file, json.loads)
    record.evaluations = _read_lines(record, folder.evaluations_file)
    record.is_being_written = was_locked or _is_locked(record.path)  # or it began while its log was read
    record.__dict__.pop("steps_per_epoch", None)
    return changed


def when(unix_s: float) -> str:
    """A time in words, in this machine's zone: 2026-05-01 14:03:21 UTC+02:00."""
    if not math.isfinite(unix_s) or unix_s <= 0:
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


def _read(record: RunRecord, path: Path, parse: Any) -> dict[str, Any]:
    if not path.exists():
        if path.name == "config.yaml":
            record.problems.append(f"{path} is missing: the configuration is not known.")
        return {}
    try:
        document = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        record.problems.append(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(document, dict):
        record.problems.append(f"{path} cannot be read: it is no mapping")
        return {}
    return document


def _read_lines(record: RunRecord, path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        record.problems.append(f"{path} cannot be read: {error}")
        return []
    documents = []
    for place, line in enumerate(lines, start=1):
        try:
            document = json.loads(line)
        except ValueError:
            record.problems.append(f"line {place} of {path} cannot be read")
            continue
        if isinstance(document, dict):
            documents.append(document)
    return documents


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine (or of one that shares its locks) is writing to the run."""
    try:
        with open(path / LOCK_NAME) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _per_window(since_start: Floats, segment: Floats) -> Floats:
    """Differences of what adds up since each start; NaN where it does not grow."""
    if not len(since_start):
        return since_start
    before = np.concatenate([[0.0], since_start[:-1]])
    before[1:][segment[1:] != segment[:-1]] = 0.0
    difference = since_start - before
    return np.where(difference > 0, difference, np.nan)


def _count(how_many: int, noun: str) -> str:
    return f"{how_many:,} {noun}{'s' if how_many != 1 else ''}"


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}." if text else "no reason was given."
