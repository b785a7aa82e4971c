"""Findings for people: a word, a colour, what was found, and under it what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from leoclr_fast.doctor.checks import Check
from leoclr_fast.doctor.finding import Finding, Status

_STYLES: dict[Status, str] = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "not applicable": "bright_black",
}
_WORDS: dict[Status, str] = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "not applicable": "n/a"}


def table(checks: Sequence[Check], findings: Sequence[Finding]) -> RenderableType:
    """One row a check; readable without colours too."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for check, finding in zip(checks, findings, strict=True):
        style = _STYLES[finding.status]
        told: RenderableType = Text(finding.found)
        if finding.remedy is not None:
            told = Group(told, Padding(Text(f"→ {finding.remedy}", style="bold"), (0, 0, 0, 2)))
        grid.add_row(Text(_WORDS[finding.status], style=style), Text(check.name, style=style), told)
    return grid


def outcome(findings: Sequence[Finding]) -> str:
    """How many of each, in one line."""
    counts = count(findings)
    parts = [f"{number} {status}" for status, number in counts.items() if number]
    verdict = "something does not work" if counts["failed"] else "nothing stands in the way of training"
    return f"{len(findings)} checks: {', '.join(parts)}; {verdict}"


def count(findings: Sequence[Finding]) -> dict[str, int]:
    """Status → number of findings, zeros too."""
    seen = Counter(finding.status for finding in findings)
    return {status: seen[status] for status in get_args(Status)}
