"""`leoclr-fast bench train-time`: what a method costs beside another on this machine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.bench.config import BenchSetting, RoundsConfig, TrainTimeConfig
from leoclr_fast.commands.written_page import write_page
from leoclr_fast.config import SpeedConfig

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class BenchTrainTime(CommonFlags):
    """Time LeOCLR and MoCo-v2 in interleaved rounds, on synthetic and on real images."""

    data: Path | None = None
    """As in pretrain; without it, synthetic images only."""
    markdown: Path | None = None
    """Write the table to this file too."""
    config: Annotated[TrainTimeConfig, _Flattened] = field(default_factory=TrainTimeConfig)
    rounds: Annotated[RoundsConfig, _Flattened] = field(default_factory=RoundsConfig)
    """How long is measured."""
    setting: Annotated[BenchSetting, _Flattened] = field(default_factory=BenchSetting)
    """The same for every method."""
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    """Changes only the speed. Without --data the images are synthetic, whatever the loader."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.train_time import bench_train_time, train_time_markdown

        document = bench_train_time(
            self.config, self.rounds, self.setting, self.speed, self.data, lambda line: say(console, line)
        )
        typed = shlex.join(["leoclr-fast", *sys.argv[1:]])
        if self.data is not None:
            typed = typed.replace(str(self.data), self.data.name)
        page = train_time_markdown(document, typed)
        say(console, page)
        write_page(self.markdown, page)
        return document
