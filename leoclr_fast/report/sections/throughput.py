"""Images per second beside their ceilings, and what to do about it."""

from __future__ import annotations

import math

from leoclr_fast.report.elements import Content, element
from leoclr_fast.report.reproduce import reproducing_command
from leoclr_fast.report.run_record import RunRecord
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
    notes.append(
        element(
            "p",
            "The loader alone is not measured in training; this does it: ",
            element("code", "leoclr-fast bench loader --data PATH"),
            class_="soft",
        )
    )
    return [element("div", drawn, class_="bars"), notes]


def _with_loader(command: str, name: str) -> str:
    words = command.split(" ")
    if "--loader.name" in words:
        at = words.index("--loader.name")
        del words[at : at + 2]
    words[words.index("--out") + 1] = f"RUN-{name}"
    return " ".join([*words, "--loader", name, "--max-steps", "200"])
