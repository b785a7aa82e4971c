"""`leoclr-fast doctor`: what this machine has and lacks. Starts without torch, which may be what is broken."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class Doctor(CommonFlags):
    """Examine this machine: GPUs, drivers, packages, disks, limits; each trouble with its remedy."""

    data: Path | None = None
    """What is to be trained on, to see whether it can be read."""
    out: Path = Path(".")
    """Where runs are to be written. A temporary file of at most 64 MiB is written there, timed and deleted."""
    only: tuple[str, ...] = ()
    """Names of checks, such as gloo or "out speed"; all of them if not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.doctor.examination import chosen_checks, examine
        from leoclr_fast.doctor.table import count, outcome, table

        checks = chosen_checks(self.only)
        with console.status("examining this machine") as status:
            findings = examine(
                checks,
                data="" if self.data is None else str(self.data),
                out=str(self.out),
                began=lambda name: status.update(f"examining this machine: {name}"),
            )
        console.print(table(checks, findings), soft_wrap=False)
        say(console, outcome(findings))
        counts = count(findings)
        return {
            "ok": counts["failed"] == 0,
            "counts": counts,
            "findings": [
                {"name": check.name, **asdict(finding)} for check, finding in zip(checks, findings, strict=True)
            ],
        }
