"""`leoclr-fast watch`: a run in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags


@dataclass(frozen=True, kw_only=True)
class Watch(CommonFlags):
    """A run in the terminal, live, from its folder: also one of another process or machine."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """The --out of a pretrain."""
    every_s: float = 2.0
    """Seconds between two looks."""
    once: bool = False
    """Show it as it is now, and return."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.report.watch import watch

        return watch(self.run_folder, console, every_s=self.every_s, once=self.once)
