"""`leoclr-fast bench step`: where the time of a training step goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.config import MethodName, SpeedConfig

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class BenchStep(CommonFlags):
    """Time the parts of a training step and the whole of it, on synthetic images."""

    methods: tuple[MethodName, ...] = ("leoclr", "mocov2")
    setting: Annotated[BenchSetting, _Flattened] = field(default_factory=BenchSetting)
    """The same for every method."""
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    """Changes only the speed. The images are synthetic, whatever the loader."""
    repeats: int = 20
    """Timed calls of each part."""
    warmup: int = 3
    """Calls before them, not timed."""
    markdown: Path | None = None
    """Write the table to this file too."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.step import StepBenchConfig, bench_step, step_markdown
        from leoclr_fast.commands.written_page import command_line, write_page

        config = StepBenchConfig(
            setting=self.setting, speed=self.speed, methods=self.methods, repeats=self.repeats, warmup=self.warmup
        )
        document = bench_step(config, lambda line: say(console, line))
        page = step_markdown(document, command_line("bench step"))
        say(console, page)
        write_page(self.markdown, page)
        return document
