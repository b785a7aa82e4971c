"""`leoclr-fast bench …`: how long things take on this machine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.bench.config import (
    BenchSetting,
    LoaderBenchConfig,
    RoundsConfig,
    TrainTimeConfig,
)
from leoclr_fast.commands.written_page import command_line, write_page
from leoclr_fast.config import SpeedConfig

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class _Bench(CommonFlags):
    markdown: Path | None = None
    """Write the table to this file too."""

    def _show(self, console: Console, page: str) -> None:
        say(console, page)
        write_page(self.markdown, page)


@dataclass(frozen=True, kw_only=True)
class BenchTrainTime(_Bench):
    """Time LeOCLR and MoCo-v2 in interleaved rounds, on synthetic and on real images."""

    data: Path | None = None
    """As in pretrain; without it, synthetic images only."""
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
        self._show(console, train_time_markdown(document, command_line("bench train-time", self.data)))
        return document


@dataclass(frozen=True, kw_only=True)
class BenchLoader(_Bench):
    """Time our loaders beside torchvision's, FFCV's and DALI's own, interleaved, each in a process of its own."""

    data: tuple[Path, ...] = ()
    """The same images in one or several formats, such as an image folder and a .beton made of it: FFCV reads the one,
    DALI's own reader the other."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run", metavar="RUN")] = None
    """The --out of a pretrain, instead of --data: times its loader on its images, at its views, image size and batch
    size, and keeps the result there, for its report."""
    config: Annotated[LoaderBenchConfig, _Flattened] = field(default_factory=LoaderBenchConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.loader import as_run_loads, bench_loader, loader_markdown
        from leoclr_fast.run.folder import RunFolder, write_json

        if bool(self.data) == (self.run_folder is not None):
            raise ValueError("bench loader needs images: give --data PATH [PATH …], or --run RUN, and not both")
        config, data, folder = self.config, self.data, None
        if self.run_folder is not None:
            folder = RunFolder(self.run_folder)
            config, images = as_run_loads(folder, config)
            data = (images,)
        document = bench_loader(config, data, lambda line: say(console, line))
        command = command_line("bench loader", *data, *filter(None, [self.run_folder]))
        self._show(console, loader_markdown(document, command))
        if folder is not None:
            write_json(folder.loader_bench_file, document)
            say(
                console,
                f"kept in {folder.loader_bench_file}; leoclr-fast report {shlex.quote(str(folder.path))} shows it",
            )
        return document
