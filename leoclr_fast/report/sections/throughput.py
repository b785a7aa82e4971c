"""Images per second beside their ceilings, and what to do about it."""

from __future__ import annotations

import math
import shlex
from typing import Any

from leoclr_fast.report.elements import Content, element
from leoclr_fast.report.reproduce import reproducing_command
from leoclr_fast.report.run_record import RunRecord
from leoclr_fast.report.values import positive
from leoclr_fast.report.verdict import bound_sentence, remedy


def throughput_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section: bars, the bottleneck with its remedy, and how to measure what was not."""
    bars: list[tuple[str, float, bool]] = []
    for run, label in zip(runs, labels, strict=True):
        rate, wait = run.images_per_s, run.data_wait_fraction
        if not math.isfinite(rate):
            continue
        name = f"{label}: " if len(runs) > 1 else ""
        if run.synthetic:
            bars.append((f"{name}synthetic images, measured: a ceiling without loading", rate, True))
            continue
        bars.append((f"{name}measured, since the run was last started", rate, False))
        if 0 < wait < 1:
            bars.append(
                (
                    f"{name}if no step had waited for data (computed from the data wait, {100 * wait:.1f} %)",
                    rate / (1 - wait),
                    True,
                )
            )
        bars += [(f"{name}{what}", ceiling, True) for what, ceiling in _loader_ceilings(run)]
    if not bars:
        return element("p", "No speed was logged.")
    highest = max(rate for _, rate, _ in bars)
    drawn = [
        element(
            "div",
            element("div", f"{name}: ", element("strong", f"{rate:,.1f} images/s")),
            element(
                "div",
                element(
                    "div",
                    class_="bar-fill ceiling" if ceiling else "bar-fill",
                    style=f"width: {100 * rate / highest:.2f}%",
                ),
                class_="bar-track",
                aria_hidden="true",
            ),
        )
        for name, rate, ceiling in bars
    ]
    notes: list[Content] = []
    for run in runs if len(runs) == 1 else []:
        if bound := bound_sentence(run):
            notes.append(element("p", f"{bound[0].upper()}{bound[1:]}. {remedy(run)}"))
    if not any(run.synthetic for run in runs):
        how = "The ceiling with synthetic images was not measured"
        if command := reproducing_command(runs[0]):
            notes.append(
                element(
                    "p",
                    f"{how}. This measures it; a report of both runs then shows the two side by side: ",
                    element("code", _with_loader(command, "synthetic")),
                    class_="soft",
                )
            )
        else:
            notes.append(element("p", f"{how}.", class_="soft"))
    for run in runs:
        if not run.synthetic and not _loader_ceilings(run):
            how = "The loader alone is not timed in training; this does it, and the next report shows it: "
            command = shlex.join(["leoclr-fast", "bench", "loader", "--run", str(run.path)])
            notes.append(element("p", how, element("code", command), class_="soft"))
    return [element("div", drawn, class_="bars"), notes]


def _loader_ceilings(run: RunRecord) -> list[tuple[str, float]]:
    """What `bench loader --run` has measured: decoding alone, where the loader decodes, and the loader alone."""
    timed = [(f"the loader {row.get('loader')} alone", row) for row in _rows(run.loader_bench.get("rows"))]
    if all(row.get("loader") != "resident" for _, row in timed):
        ceilings = _rows(run.loader_bench.get("ceilings"))
        timed += [("decoding alone", row) for row in ceilings if row.get("loader") == "decode-only"]
    rates = [(f"{what}, measured by bench loader", positive(row.get("images_per_s"))) for what, row in timed]
    return [(what, rate) for what, rate in rates if math.isfinite(rate)]


def _rows(listed: Any) -> list[dict[str, Any]]:
    return [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []


def _with_loader(command: str, name: str) -> str:
    words = command.split(" ")
    for flag in ("--loader.name", "--max-steps"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    words[words.index("--out") + 1] = f"RUN-{name}"
    return " ".join([*words, "--loader", name, "--max-steps", "200"])
