"""`metrics.jsonl` as columns: tolerant of what a dying, running or newer program left there, and fast at any length."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leoclr_fast.run.folder import STEP_METRICS

FORMAT = 1
"""Of the records. A reader that meets a higher number shows what it knows, and says so."""

STEP_COLUMNS = ("step", "epoch", *STEP_METRICS, "lr", "images_per_s", "data_wait_fraction", "unix_s")
KNOWN_KINDS = ("step", "knn", "start", "end", "warning")

_STEP_LINE = b'{"kind": "step"'  # as MetricsLog writes it
_MAX_PARSED_STEPS = 150_000
_BLOCK_BYTES = 1 << 24

Floats = npt.NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class MetricsFile:
    """The records of a run, so far; `update` reads what was added since.

    A file of more than 150,000 records is thinned while it is read: every n-th step record, the last one, all that
    hold a NaN or an infinity, and all records of other kinds.
    """

    path: Path
    knn: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    last_mark: str = ""
    """The kind of the newest record that is a start or an end: `start` in a run that has not told of its end."""
    num_step_records: int = 0
    """In the file; `column` may hold fewer."""
    num_damaged_lines: int = 0
    """Whole lines that are no JSON objects."""
    half_line: bool = False
    """Whether the last line is cut off: the run was killed while it wrote, or is writing just now."""
    unknown_kinds: set[str] = field(default_factory=set)
    newest_format: int = FORMAT
    last_unix_s: float = math.nan
    """When the newest record was written; NaN if the records do not say."""
    _columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*STEP_COLUMNS, "segment")})
    _segments: list[tuple[float, float]] = field(default_factory=list)
    _offset: int = 0
    _inode: int = -1
    _stride: int = 1
    _skipped: bytes = b""

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def update(self) -> bool:
        """Read what is new; whether there was something. A file that was replaced or cut is read from its start."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed by the with below
        except OSError:
            return False
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._forget()
                self._inode = status.st_ino
                self._stride = max(1, math.ceil(_count_lines(file) / _MAX_PARSED_STEPS))
            if status.st_size == self._offset:
                return False
            file.seek(self._offset)
            before = self._offset
            self.half_line = False
            for line in file:
                if not line.endswith(b"\n"):
                    self.half_line = True  # read again when it is whole
                    break
                self._offset += len(line)
                self._take_line(line)
            if self._skipped:
                self._parse(self._skipped)  # the newest step is never left out
                self._skipped = b""
            return self._offset > before

    def column(self, name: str) -> Floats:
        """Of the step records: one of STEP_COLUMNS, or `segment`, the number of the start it followed."""
        return np.array(self._columns[name], dtype=np.float64)

    @property
    def num_steps_kept(self) -> int:
        """Length of a column."""
        return len(self._columns["step"])

    @property
    def last(self) -> dict[str, float]:
        """The newest step record; empty if there is none."""
        return {name: values[-1] for name, values in self._columns.items()} if self._columns["step"] else {}

    @property
    def last_step(self) -> int:
        """The newest step of any record."""
        newest = [self.last.get("step", 0.0)] + [
            _number(records[-1], "step") for records in (self.knn, self.ends) if records
        ]
        return int(max((step for step in newest if math.isfinite(step)), default=0))

    @property
    def wall_s(self) -> float:
        """Seconds from each start to the last record before the next one, added up; NaN if records have no times."""
        if not self._segments:
            return math.nan
        return sum(end - start for start, end in self._segments)

    def _forget(self) -> None:
        fresh = MetricsFile(path=self.path)
        for name in MetricsFile.__slots__:
            setattr(self, name, getattr(fresh, name))

    def _take_line(self, line: bytes) -> None:
        if line.startswith(_STEP_LINE):
            self.num_step_records += 1
            # NaN, Infinity and -Infinity are the only capital N and I in a step record.
            if self._stride > 1 and self.num_step_records % self._stride and b"N" not in line and b"I" not in line:
                self._skipped = line
                return
            self._skipped = b""
        self._parse(line)

    def _parse(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            if line.strip():
                self.num_damaged_lines += 1
            return
        if not isinstance(record, dict):
            self.num_damaged_lines += 1
            return
        self._note_time(record)
        match record.get("kind"):
            case "step":
                self._add_step(record)
            case "knn" if math.isfinite(_number(record, "step")):
                while self.knn and self.knn[-1]["step"] >= record["step"]:
                    self.knn.pop()
                self.knn.append(record)
            case "start":
                self.starts.append(record)
                self.last_mark = "start"
                format_number = _number(record, "format")
                if math.isfinite(format_number):
                    self.newest_format = max(self.newest_format, int(format_number))
            case "end":
                self.ends.append(record)
                self.last_mark = "end"
            case "warning":
                self.warnings.append(record)
            case kind:
                self.unknown_kinds.add(str(kind))

    def _add_step(self, record: dict[str, Any]) -> None:
        step = _number(record, "step")
        if not math.isfinite(step):
            self.num_damaged_lines += 1
            return
        steps = self._columns["step"]
        while steps and steps[-1] >= step:  # a resumed run logs these steps again
            for values in self._columns.values():
                values.pop()
        for name in STEP_COLUMNS:
            self._columns[name].append(_number(record, name))
        self._columns["segment"].append(len(self.starts) - 1)

    def _note_time(self, record: dict[str, Any]) -> None:
        now = _number(record, "unix_s")
        if not math.isfinite(now):
            return
        self.last_unix_s = now
        if record.get("kind") == "start" or not self._segments:
            self._segments.append((now, now))
        else:
            self._segments[-1] = (self._segments[-1][0], max(now, self._segments[-1][1]))


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _count_lines(file: Any) -> int:
    lines = 0
    while block := file.read(_BLOCK_BYTES):
        lines += block.count(b"\n")
    return lines
