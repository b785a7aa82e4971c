"""`leoclr-fast bench scaling`: what more ranks bring."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.config import MethodName, SpeedConfig

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class BenchScaling(CommonFlags):
    """Time training on 1 to N ranks of this machine, in turns, with its share of communication; project to more."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks to time. The command starts them itself, one for each GPU, or on the CPU."""
    mode: Literal["weak", "strong", "both"] = "both"
    """weak: --batch-size is that of each rank. strong: it is the global one, shared by all ranks."""
    method: MethodName = "leoclr"
    query_batchnorm: Literal["plain", "sync"] = "plain"
    """As in pretrain."""
    setting: Annotated[BenchSetting, _Flattened] = field(default_factory=BenchSetting)
    """The same for every number of ranks."""
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    """Changes only the speed. The images are synthetic, whatever the loader."""
    rounds: int = 5
    """Every number of ranks has one turn in each; the order is reversed from round to round."""
    steps: int = 20
    """Timed steps of a turn."""
    warmup_steps: int = 5
    """Steps before them, not timed: every turn makes its step anew."""
    project_to: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of ranks to project to, by a model fitted to the timings: not measured."""
    max_s: float = 1800.0
    """No new round begins after so many seconds; two are always run."""
    limit_s: float = 300.0
    """A turn that takes longer is an error."""
    markdown: Path | None = None
    """Write the tables to this file too."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.scaling import ScalingConfig, bench_scaling
        from leoclr_fast.bench.scaling_report import scaling_markdown
        from leoclr_fast.commands.written_page import command_line, write_page

        config = ScalingConfig(
            setting=self.setting,
            speed=self.speed,
            method=self.method,
            ranks=self.ranks,
            mode=self.mode,
            query_batchnorm=self.query_batchnorm,
            rounds=self.rounds,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            project_to=self.project_to,
            max_s=self.max_s,
            limit_s=self.limit_s,
        )
        document = bench_scaling(config, lambda line: say(console, line))
        page = scaling_markdown(document, command_line("bench scaling"))
        say(console, page)
        write_page(self.markdown, page)
        return document
