"""`metrics.jsonl` as columns: tolerant of what a dying, running or newer program left there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import convert

from dataset_tools.files import open_regular
from leoclr_fast.run.documents import FORMAT, RECORDS, AnyRecord, End, Knn, Record, Start, Warned, read_line

_METRIC_NAMES = ("positive_similarity", "negative_similarity")  # of logs that do not name their method's

Floats = npt.NDArray[np.float64]


def number(value: Any) -> float:
    """A number out of a document, as a float; NaN where it is missing or no number."""
    return float(value) if isinstance(value, int | float) else math.nan


@dataclass(slots=True, kw_only=True)
class MetricsFile:
    """The records of a run, so far; `update` reads what was added since."""

    path: Path
    knn: list[Knn] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    last_mark: str = ""
    """The kind of the newest record that is a start or an end: `start` in a run that has not recorded its end."""
    num_damaged_lines: int = 0
    """Whole lines that are no records."""
    half_line: bool = False
    """Whether the last line is cut off: the run was killed while it wrote, or is writing just now."""
    unknown_kinds: set[str] = field(default_factory=set)
    last_unix_s: float = math.nan
    """When the newest record was written; NaN if the records do not say."""
    _columns: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "segment": []})
    _segments: list[tuple[float, float]] = field(default_factory=list)
    _offset: int = 0
    _inode: int = -1

    def update(self) -> bool:
        """Read what is new; whether there was something. A file that was replaced or cut is read from its start."""
        try:
            file = open_regular(self.path)
        except OSError:
            return False
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                fresh = MetricsFile(path=self.path, _inode=status.st_ino)
                for each in fields(fresh):
                    setattr(self, each.name, getattr(fresh, each.name))
            before = self._offset
            file.seek(before)
            self.half_line = False
            for line in file:
                if not line.endswith(b"\n"):
                    self.half_line = True  # read again when it is whole
                    break
                self._offset += len(line)
                self._parse(line)
            return self._offset > before

    def column(self, name: str) -> Floats:
        """A field of the step records, NaN where one does not have it; of `segment`, the number of the start that each
        followed.
        """
        return np.array(self._columns.get(name, [math.nan] * self.num_steps), dtype=np.float64)

    @property
    def metric_names(self) -> Sequence[str]:
        """What the run's method logs beside the loss and the gradient norm."""
        names = self.starts[-1].metrics if self.starts else None
        return _METRIC_NAMES if names is None else names

    @property
    def format(self) -> int:
        """The newest format of the records."""
        return max((start.format for start in self.starts), default=FORMAT)

    @property
    def num_steps(self) -> int:
        """Length of a column."""
        return len(self._columns["step"])

    @property
    def last(self) -> dict[str, float]:
        """The newest step record; empty if there is none."""
        return {name: values[-1] for name, values in self._columns.items()} if self.num_steps else {}

    @property
    def last_step(self) -> int:
        """The newest step of any record."""
        newest = [self.last.get("step", 0), *(each[-1].step for each in (self.knn, self.ends) if each)]
        return int(max(newest))

    @property
    def wall_s(self) -> float:
        """Seconds from each start to the last record before the next one, added up; NaN if records have no times."""
        return sum(end - start for start, end in self._segments) if self._segments else math.nan

    def _parse(self, line: bytes) -> None:
        """Take a record in; one that lacks what its kind must have is damaged."""
        try:
            document = read_line(line, Record)
            kind = document["kind"]
            record: AnyRecord = convert(document, RECORDS.get(kind, Record))
        except ValueError:
            self.num_damaged_lines += bool(line.strip())
            return
        self._note_time(kind, number(document.get("unix_s")))
        match record:
            case Knn():
                while self.knn and self.knn[-1].step >= record.step:
                    self.knn.pop()
                self.knn.append(record)
            case Start():
                self.starts.append(record)
                self.last_mark = kind
            case End():
                self.ends.append(record)
                self.last_mark = kind
            case Warned():
                self.warnings.append(record)
            case _ if kind == "step":
                self._add_step(float(record.step), document)
            case _:
                self.unknown_kinds.add(kind)

    def _add_step(self, step: float, record: dict[str, Any]) -> None:
        steps = self._columns["step"]
        while steps and steps[-1] >= step:  # a resumed run logs these steps again
            for values in self._columns.values():
                values.pop()
        del record["kind"]
        record["segment"] = len(self.starts) - 1
        if not record.keys() <= self._columns.keys():
            self._columns |= {name: [math.nan] * len(steps) for name in record if name not in self._columns}
        for name, values in self._columns.items():
            values.append(number(record.get(name)))

    def _note_time(self, kind: str, unix_s: float) -> None:
        if not math.isfinite(unix_s):
            return
        self.last_unix_s = unix_s
        if kind == "start" or not self._segments:
            self._segments.append((unix_s, unix_s))
        else:
            begin, end = self._segments[-1]
            self._segments[-1] = (begin, max(unix_s, end))
