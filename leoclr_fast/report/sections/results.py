"""What evaluators found, in training and afterwards."""

from __future__ import annotations

import re
from typing import Any

from leoclr_fast.report.elements import Content, element, table
from leoclr_fast.report.evaluation_table import METRICS
from leoclr_fast.report.run_record import RunRecord, when

_DIGEST = re.compile("[0-9a-f]{64}")


def results_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section: a row for each evaluation."""
    rows: list[list[Content]] = []
    for run, label in zip(runs, labels, strict=True):
        for record in _first_and_last(run.metrics.knn):
            epoch = record.get("epoch")
            place = f"in training, epoch {epoch:g}" if isinstance(epoch, int | float) else "in training"
            rows.append([label, "knn", *_result_cells(record, ("kind", "step", "epoch", "unix_s")), place])
        for record in run.evaluations:
            place = when(float(record["unix_s"])) if isinstance(record.get("unix_s"), int | float) else ""
            cells = _result_cells(record, ("evaluator", "unix_s"))
            rows.append([label, str(record.get("evaluator", "?")), *cells, place])
    if not rows:
        return element("p", "No evaluator has run: there is no accuracy to show.")
    head = ["run", "evaluator", "result", "settings", "when"]
    hidden = 1 if len(runs) == 1 else 0  # a single run needs no name
    return [
        table(head[hidden:], [row[hidden:] for row in rows], "What evaluators found"),
        element("p", "Every kNN accuracy of the training stands in the table behind its curve.", class_="soft"),
    ]


def _first_and_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0], records[-1]] if len(records) > 1 else records


def _result_cells(record: dict[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """What was found, and everything else the evaluator said, but for lists and tables."""
    settings_of = record.get("settings", record.get("config"))
    nested = settings_of if isinstance(settings_of, dict) else {}
    found, settings = [], []
    for key, value in {**nested, **record}.items():
        if key in left_out or value is None or value == "" or isinstance(value, dict | list):
            continue
        shown = f"{value[:12]}…" if isinstance(value, str) and _DIGEST.fullmatch(value) else value
        name = METRICS.get(key.lower(), key.replace("_", " "))
        if key.lower() in METRICS and isinstance(value, int | float):
            found.append(f"{name} {value:.2f} %")
        elif isinstance(value, float) and key not in nested and key not in ("temperature",):
            found.append(f"{name} {value:.4g}")
        else:
            settings.append(f"{name} {shown:g}" if isinstance(shown, float) else f"{name} {shown}")
    return [", ".join(found), ", ".join(settings)]
