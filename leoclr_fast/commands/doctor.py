"""`leoclr-fast doctor`: what this machine has and lacks. Starts without torch, which may be what is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dataset_tools.command_line import CommonFlags, say

if TYPE_CHECKING:
    from leoclr_fast.doctor.result import Result

_SHOWN = {
    "ok": ("ok", "green"),
    "warning": ("WARNING", "yellow"),
    "failed": ("FAILED", "bold red"),
    "not applicable": ("n/a", "bright_black"),
}


@dataclass(frozen=True, kw_only=True)
class Doctor(CommonFlags):
    """Examine this machine: GPUs, drivers, packages, disks, limits; each trouble with its remedy."""

    data: Path | None = None
    """What is to be trained on, to see whether it can be read."""
    out: Path = Path(".")
    """Where runs are to be written; a temporary file tries it."""
    only: tuple[str, ...] = ()
    """Names of checks, such as gloo or "out folder"; all of them if not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.doctor.checks import chosen_checks
        from leoclr_fast.doctor.examination import examine
        from leoclr_fast.doctor.result import STATUSES

        checks = chosen_checks(self.only)
        with console.status("examining this machine"):
            results = examine(checks, data="" if self.data is None else str(self.data), out=str(self.out))
        names, statuses = [check.name for check in checks], [result.status for result in results]
        counts = {status: statuses.count(status) for status in STATUSES}
        console.print(table(names, results), soft_wrap=False)
        parts = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        works = "something does not work" if counts["failed"] else "nothing stands in the way of training"
        say(console, f"{len(results)} checks: {parts}; {works}")
        return {
            "ok": counts["failed"] == 0,
            "counts": counts,
            "findings": [{"name": name, **asdict(result)} for name, result in zip(names, results, strict=True)],
        }


def table(names: Sequence[str], results: Sequence[Result]) -> RenderableType:
    """A word, a colour, what was found, and under it what to do; readable without colours too."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for name, result in zip(names, results, strict=True):
        word, style = _SHOWN[result.status]
        found: RenderableType = Text(result.found)
        if result.remedy is not None:
            found = Group(found, Padding(Text(f"→ {result.remedy}", style="bold"), (0, 0, 0, 2)))
        grid.add_row(Text(word, style=style), Text(name, style=style), found)
    return grid
