"""The report: one HTML file out of one run folder, or out of several side by side. Nothing in it is fetched."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import to_builtins

from dataset_tools.files import write_file
from dataset_tools.images import decode_rgb
from leoclr_fast.config_file import differences, flat
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.curves import plots_of
from leoclr_fast.report.evaluation_table import METRICS, table_of
from leoclr_fast.report.metrics_file import number
from leoclr_fast.report.plots import MAX_POINTS, drawn
from leoclr_fast.report.reference import find_reference
from leoclr_fast.report.rendering import rendered, shown_value
from leoclr_fast.report.reproduce import changed_settings, reproducing_command
from leoclr_fast.report.run_record import RunRecord, read_run, when
from leoclr_fast.report.sentence import as_sentence, bottleneck, bound_clause, summary_sentence
from leoclr_fast.run.documents import End, Start
from leoclr_fast.run.folder import RunFolder

_TEMPLATE = Path(__file__).with_name("templates") / "report.html"
_POINTS_OF_A_PAGE = 3200  # of each plot, over all runs: keeps twenty runs under 2 MB
_SHEET_BYTES = 250_000
_MAX_SHEETS = 4
_DIGEST = re.compile("[0-9a-f]{64}")


def write_report(paths: list[Path], out: Path) -> dict[str, Any]:
    """Write the page of the runs in `paths`, whole or not at all.

    Returns out, bytes, and for each run its newest values. Raises FileNotFoundError for what is no run
    folder, ValueError if `out` is no .html, OSError if it cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out} is not an HTML file; give a name that ends in .html")
    runs = [read_run(path) for path in paths]
    page = page_of(runs).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return {"out": str(out), "bytes": len(page), "runs": [run.snapshot() for run in runs]}


def page_of(runs: list[RunRecord]) -> str:
    single = len(runs) == 1
    if not single:
        _label(runs)
    labels = ", ".join(run.label for run in runs)
    reference, no_reference = find_reference(runs[0]) if single else (None, "")
    max_points = max(50, min(MAX_POINTS, _POINTS_OF_A_PAGE // len(runs)))
    figures = [drawn(plot, max_points) for plot in plots_of(runs, reference)]
    views = [(run, _contact_sheet(run)) for run in runs[:_MAX_SHEETS]]
    sections = {
        "curves": "Curves",
        "views": "Views",
        "throughput": "Throughput",
        "results": "Results",
        "configuration": "Configuration",
        "environment": "Environment",
        "warnings": "Warnings and left-out files",
        "reproduce": "How to reproduce",
    }
    return rendered(
        _TEMPLATE,
        title=f"{runs[0].recipe}: {runs[0].path}" if single else f"{len(runs)} runs side by side: {labels}",
        heading=runs[0].recipe if single else f"{len(runs)} runs side by side",
        sections=sections if single else {"comparison": "Side by side", **sections},
        runs=runs,
        sentences=[summary_sentence(run) for run in runs],
        comparison_tables=[] if single else table_of(runs).as_text(),
        plots=figures,
        expected=f"Expected curve: {reference.source}." if reference is not None else no_reference,
        views=views,
        results=[row for run in runs for row in _results(run)],
        commands=[(run, words and shlex.join(words)) for run in runs for words in [reproducing_command(run)]],
        warnings=[(run, run.notes(), lists) for run in runs if (lists := _lists(run)) or run.notes()],
        **_throughput(runs),
        **(_of_one_run(runs[0]) if single else _differences(runs)),
    )


class Bar(NamedTuple):
    """A speed, of a run or a ceiling of it."""

    name: str
    images_per_s: float
    is_ceiling: bool


def _throughput(runs: list[RunRecord]) -> dict[str, Any]:
    """Images per second beside their ceilings, and what bound a single run."""
    bars = []
    for run in runs:
        rate, wait = run.images_per_s, run.data_wait_fraction
        name = f"{run.label}: " if len(runs) > 1 else ""
        if math.isfinite(rate) and run.synthetic:
            bars.append(Bar(f"{name}synthetic images, measured: a ceiling without loading", rate, True))
        elif math.isfinite(rate):
            bars.append(Bar(f"{name}measured, since the run was last started", rate, False))
            if 0 < wait < 1:
                if_fed = f"if no step had waited for data (computed from the data wait, {100 * wait:.1f} %)"
                bars.append(Bar(f"{name}{if_fed}", rate / (1 - wait), True))
    found = bottleneck(runs[0])
    return {
        "bars": bars,
        "bound": as_sentence(bound_clause(runs[0])),
        "remedy": as_sentence(found.remedy) if found else "",
    }


def _contact_sheet(run: RunRecord) -> dict[str, Any] | None:
    """The contact sheet of a run's views, as a JPEG of at most 250 kB inside the page."""
    path = RunFolder(run.path).preview_file
    if not path.is_file():
        return None
    try:
        picture = decode_rgb(path)
    except (OSError, ValueError) as error:
        run.problems.append(f"{path} cannot be read: {error}")
        return None
    picture.thumbnail((1400, 1400))
    for quality in (85, 70, 50, 30):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= _SHEET_BYTES:
            encoded = base64.b64encode(buffer.getvalue()).decode()
            return {"src": f"data:image/jpeg;base64,{encoded}", "width": picture.width, "height": picture.height}
    return None


def _results(run: RunRecord) -> list[list[str]]:
    """What evaluators found, in training (its first and last kNN) and afterwards: a row for each evaluation."""
    rows = []
    for knn in [run.metrics.knn[0], *run.metrics.knn[1:][-1:]] if run.metrics.knn else []:
        cells = _result_cells(to_builtins(knn), ("step", "epoch"))
        rows.append([run.label, "knn", *cells, f"in training, epoch {knn.epoch:g}"])
    for record in run.evaluations:
        place = when(record["unix_s"]) if record.get("unix_s") is not None else ""
        rows.append([run.label, record["evaluator"], *_result_cells(record, ("evaluator", "unix_s")), place])
    return rows


def _result_cells(record: dict[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """What was found, and everything else the evaluator said, but for lists and tables."""
    nested = record.get("settings") or {}
    found, settings = [], []
    for key, value in {**nested, **record}.items():
        if key in left_out or value is None or value == "" or isinstance(value, dict | list):
            continue
        shown = f"{value[:12]}…" if isinstance(value, str) and _DIGEST.fullmatch(value) else value
        name = METRICS.get(key.lower(), key.replace("_", " "))
        if key.lower() in METRICS and isinstance(value, int | float):
            found.append(f"{name} {value:.2f} %")
        elif isinstance(value, float) and key not in nested and key != "temperature":
            found.append(f"{name} {value:.4g}")
        else:
            settings.append(f"{name} {shown:g}" if isinstance(shown, float) else f"{name} {shown}")
    return [", ".join(found), ", ".join(settings)]


def _of_one_run(run: RunRecord) -> dict[str, Any]:
    """Its settings by part of the configuration and what was changed of them, its environment, its starts and ends."""
    parts = {part: values for part, values in run.config.items() if part != "recipe"}
    starts, ends = run.metrics.starts, run.metrics.ends
    history, marks = [], list[Start | End]([*starts, *ends])
    for record in sorted(marks, key=lambda record: record.unix_s or 0.0):
        what, how = "started", ""
        if isinstance(record, End):
            what, how = "ended", " ".join(filter(None, (record.status, record.reason, record.where)))
        history.append([when(number(record.unix_s)), what, record.step, how])
    uneventful = len(starts) < 2 and all(end.status == "finished" for end in ends)
    return {
        "settings": {
            part: flat(values) if isinstance(values, dict) else {part: values} for part, values in parts.items()
        },
        "changed": changed_settings(run) if run.recipe in RECIPES else None,
        "environment": [[name, shown_value(value)] for name, value in flat(to_builtins(run.environment)).items()],
        "history": [] if uneventful else history,
    }


def _differences(runs: list[RunRecord]) -> dict[str, Any]:
    """Settings and environments, where the runs differ."""
    surroundings = [
        {"data": {"fingerprint": run.data.fingerprint, "images": run.data.images}, **to_builtins(run.environment)}
        for run in runs
    ]
    tables = {"settings": differences([run.config for run in runs]), "environment": differences(surroundings)}
    shown = {
        key: [[name, *map(shown_value, values)] for name, values in found.items()] for key, found in tables.items()
    }
    return {**shown, "labels": [run.label for run in runs]}


def _lists(run: RunRecord) -> list[tuple[str, list[str], int]]:
    """What was warned of, unreadable or left out: a title, the lines that are known, and of how many."""
    warned = [f"step {record.step}: {record.text}" for record in run.metrics.warnings]
    unreadable = [f"{image}: {why}" for image, why in run.summary.unreadable_images.items()]
    quarantine = run.data.quarantined
    left_out = [f"{entry.name}: {entry.reason}" for entry in quarantine.listed]
    lists = [
        ("Warned while it ran", warned, len(warned)),
        ("Images that could not be read, each replaced by the next", unreadable, len(unreadable)),
        ("Images that the conversion left out (quarantine.jsonl)", left_out, quarantine.images),
    ]
    return [each for each in lists if each[1]]


def _label(runs: list[RunRecord]) -> None:
    """Call each by what its path adds to that of the folder which holds them all."""
    paths = [run.path.resolve() for run in runs]
    holding = os.path.commonpath(paths)
    for run, path in zip(runs, paths, strict=True):
        run.label = path.name if str(path) == holding else os.path.relpath(path, holding)
