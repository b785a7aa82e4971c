"""The report: one HTML file out of one run folder, or out of several side by side. Nothing in it is fetched."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from leoclr_fast.report.document import Section, document
from leoclr_fast.report.elements import Markup, element, joined
from leoclr_fast.report.reference import find_reference
from leoclr_fast.report.run_record import RunRecord, read_run, when
from leoclr_fast.report.sections.configuration import configuration_of, differences_of
from leoclr_fast.report.sections.curves import curves_of
from leoclr_fast.report.sections.environment import environment_of, environments_of
from leoclr_fast.report.sections.reproduction import reproduction_of
from leoclr_fast.report.sections.results import results_of
from leoclr_fast.report.sections.side_by_side import side_by_side
from leoclr_fast.report.sections.throughput import throughput_of
from leoclr_fast.report.sections.views import views_of
from leoclr_fast.report.sections.warnings import warnings_of
from leoclr_fast.report.verdict import verdict
from leoclr_fast.run.folder import write_atomically


def write_report(paths: list[Path], out: Path) -> dict[str, Any]:
    """Write the page of the runs in `paths`, whole or not at all.

    Returns out, bytes, and for each run what its verdict is made of. Raises FileNotFoundError for what is no run
    folder, ValueError if `out` is no .html, OSError if it cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out} is not an HTML file; give a name that ends in .html")
    runs = [read_run(path) for path in paths]
    page = page_of(runs).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return {"out": str(out), "bytes": len(page), "runs": [_digest(run) for run in runs]}


def page_of(runs: list[RunRecord]) -> str:
    """The whole page."""
    single = len(runs) == 1
    labels = ["this run"] if single else _labels(runs)
    reference, no_reference = find_reference(runs[0]) if single else (None, "")
    curves, plot_data = curves_of(runs, labels, reference, no_reference)
    sections: list[Section] = []
    if not single:
        sections.append(("comparison", "Side by side", side_by_side(runs, labels)))
    sections += [
        ("curves", "Curves", curves),
        ("views", "Views", views_of(runs, labels)),
        ("throughput", "Throughput", throughput_of(runs, labels)),
        ("results", "Results", results_of(runs, labels)),
        ("configuration", "Configuration", configuration_of(runs[0]) if single else differences_of(runs, labels)),
        ("environment", "Environment", environment_of(runs[0]) if single else environments_of(runs, labels)),
        ("warnings", "Warnings and left-out files", warnings_of(runs, labels)),
        ("reproduce", "How to reproduce", reproduction_of(runs, labels)),
    ]
    title = f"{runs[0].recipe}: {runs[0].path}" if single else f"{len(runs)} runs side by side: {', '.join(labels)}"
    return document(
        title=title,
        heading=runs[0].recipe if single else f"{len(runs)} runs side by side",
        opening=[
            element("p", "Run folder ", element("code", str(runs[0].path)), class_="soft") if single else None,
            [_opening(run, None if single else label) for run, label in zip(runs, labels, strict=True)],
        ],
        sections=sections,
        plot_data=plot_data,
    )


def _opening(run: RunRecord, label: str | None) -> Markup:
    """Verdict and state."""
    state = run.state
    named = element("strong", f"{label}: ") if label is not None else None
    then = (
        f" So it was when this page was written, on {when(time.time())}; a run that was killed since could not say so. "
        "leoclr-fast report makes the page anew."
        if state.kind in ("running", "unsure")
        else None
    )
    return joined(
        [
            element("p", named, verdict(run), class_="verdict" if label is None else None),
            element("p", state.sentence, then, class_=f"state {state.kind}"),
        ]
    )


def _digest(run: RunRecord) -> dict[str, Any]:
    """What `--json` tells of a run; None for what is not known."""
    values = {
        "images_per_s": run.images_per_s,
        "knn_top1": run.knn_top1,
        "data_wait_fraction": run.data_wait_fraction,
        "wall_s": run.wall_s,
        "epochs": run.epochs_done,
    }
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {"run": str(run.path), "state": run.state.kind, "steps": run.metrics.last_step, **known}


def _labels(runs: list[RunRecord]) -> list[str]:
    """The shortest end of each path that says something and that no other run shares; numbered where they are equal."""
    paths = [run.path.resolve().parts for run in runs]
    labels = []
    for number, parts in enumerate(paths):
        others = [other for index, other in enumerate(paths) if index != number]
        for length in range(2 if parts[-1] == "run" else 1, len(parts) + 1):
            if all(other[-length:] != parts[-length:] for other in others):
                break
        label = "/".join(parts[-length:])
        labels.append(label if parts not in others else f"{label} ({number + 1})")
    return labels
