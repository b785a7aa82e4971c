"""The commands that look at runs: `leoclr-fast report`, `compare` and `watch`."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class Report(CommonFlags):
    """One HTML page about a run, or about several side by side: report RUN [RUN …] --out FILE.html."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """The --out of each pretrain; they may be running still."""
    out: Path | None = None
    """The page to write; report.html in the run folder if there is one RUN and this is not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.report.page import write_report
        from leoclr_fast.run.folder import RunFolder

        if not self.runs:
            raise ValueError("report needs a run folder: leoclr-fast report RUN [RUN …] --out FILE.html")
        if self.out is None and len(self.runs) > 1:
            raise ValueError("a report of several runs needs a place of its own: give --out FILE.html")
        out = RunFolder(self.runs[0]).report_file if self.out is None else self.out
        try:
            document = write_report(list(self.runs), out)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ValueError(f"cannot write {out}: {error.strerror}; give --out FILE.html, elsewhere") from error
        say(console, f"report: {out} ({document['bytes'] / 1e3:,.0f} kB)")
        return document


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
