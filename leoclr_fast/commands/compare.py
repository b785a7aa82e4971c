"""`leoclr-fast compare`: LeOCLR beside MoCo-v2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class Compare(CommonFlags):
    """All results of some runs in one table, over their seeds: leoclr-fast compare RUN_A RUN_B …."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders; those that differ in nothing but the seed are averaged."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.report.evaluation_table import evaluation_table

        table = evaluation_table(self.runs)
        say(console, table.as_markdown())
        return table.as_document()
