"""Versions, hardware and starts of a run, or what differs between those of several."""

from __future__ import annotations

import numpy as np

from leoclr_fast.report.comparison import differing_environment
from leoclr_fast.report.elements import Content, element, table
from leoclr_fast.report.reproduce import flat
from leoclr_fast.report.run_record import RunRecord, when
from leoclr_fast.report.values import number, shown_value


def environment_of(run: RunRecord) -> Content:
    """The section of a single run."""
    if not run.environment:
        return [element("p", "The environment was not recorded."), _history(run)]
    rows = [[name, shown_value(value)] for name, value in flat(run.environment).items()]
    return [
        element("p", "Git commit: ", element("code", str(run.environment.get("git_commit") or "not known"))),
        element("details", element("summary", "Versions and hardware"), table(["what", "value"], rows, "Environment")),
        _history(run),
    ]


def environments_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section of several runs."""
    rows = [[name, *map(shown_value, values)] for name, values in differing_environment(runs).items()]
    if not rows:
        return element("p", "The same data, versions and hardware, as far as was recorded.")
    return table(["what", *labels], rows, "Only what differs")


def _history(run: RunRecord) -> Content:
    """When the run was started and how each of these ended, if that is more than once and well."""
    marks = [("started", record) for record in run.metrics.starts] + [("ended", record) for record in run.metrics.ends]
    if len(run.metrics.starts) < 2 and all(record.get("status") == "finished" for record in run.metrics.ends):
        return None
    marks.sort(key=lambda mark: np.nan_to_num(number(mark[1].get("unix_s"))))
    rows = []
    for what, record in marks:
        reason = " ".join(str(record[key]) for key in ("status", "reason", "where") if record.get(key))
        rows.append([when(number(record.get("unix_s"))), what, str(record.get("step", "?")), reason])
    return element(
        "details",
        element(
            "summary", "Started once" if len(run.metrics.starts) == 1 else f"Started {len(run.metrics.starts)} times"
        ),
        table(["when", "what", "step", "how"], rows, "Starts and ends"),
    )
