"""`leoclr-fast bench train-time`: what LeOCLR costs next to MoCo-v2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.bench.projection import ProjectionConfig
from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.bench.turns_config import TurnsConfig
from leoclr_fast.config import SpeedConfig

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class BenchTrainTime(CommonFlags):
    """Time LeOCLR and MoCo-v2 in turns, on synthetic and on real images; project hours, energy and cost."""

    data: Path | None = None
    """As in pretrain; without it, synthetic images only."""
    setting: Annotated[BenchSetting, _Flattened] = field(default_factory=BenchSetting)
    """The same for every method."""
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    """Changes only the speed."""
    turns: Annotated[TurnsConfig, _Flattened] = field(default_factory=TurnsConfig)
    """How long is measured."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """The pretraining that is projected."""
    peers: bool = False
    """Also time the published MoCo-v2 loop and lightly's MoCo-v2 (from a checkout of the repository)."""
    max_images: int | None = None
    """At most so many real images."""
    markdown: Path | None = None
    """Write the tables to this file too."""
    plot: Path | None = None
    """Draw the rates into this file (.svg, .png or .pdf)."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.train_time import TrainTimeConfig, bench_train_time
        from leoclr_fast.bench.train_time_report import plot_train_time, require_plot_format, train_time_markdown
        from leoclr_fast.commands.written_page import command_line, write_page

        if self.plot is not None:
            require_plot_format(self.plot)
        config = TrainTimeConfig(
            setting=self.setting,
            speed=self.speed,
            turns=self.turns,
            projection=self.projection,
            peers=self.peers,
            max_images=self.max_images,
        )
        document = bench_train_time(config, self.data, lambda line: say(console, line))
        page = train_time_markdown(document, command_line("bench train-time", self.data))
        say(console, page)
        write_page(self.markdown, page)
        if self.plot is not None:
            plot_train_time(document, self.plot)
        return document
