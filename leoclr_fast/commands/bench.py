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
    AugmentBenchConfig,
    BenchSetting,
    LoaderBenchConfig,
    LossBenchConfig,
    RoundsConfig,
    ScalingConfig,
    StepBenchConfig,
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
class _TrainingBench(_Bench):
    setting: Annotated[BenchSetting, _Flattened] = field(default_factory=BenchSetting)
    """The same for every method."""
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    """Changes only the speed. Where no --data is given, the images are synthetic, whatever the loader."""


@dataclass(frozen=True, kw_only=True)
class BenchLoss(_Bench):
    """Time forward and backward of every InfoNCE, in interleaved rounds, beside one cross entropy for each key."""

    config: Annotated[LossBenchConfig, _Flattened] = field(default_factory=LossBenchConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.kernels import bench_loss, loss_markdown

        document = bench_loss(self.config)
        self._show(console, loss_markdown(document, command_line("bench loss")))
        return document


@dataclass(frozen=True, kw_only=True)
class BenchAugment(_Bench):
    """Time jitter, grayscale, blur, flip and normalisation of a batch's views by every implementation, interleaved."""

    config: Annotated[AugmentBenchConfig, _Flattened] = field(default_factory=AugmentBenchConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.kernels import augment_markdown, bench_augment

        document = bench_augment(self.config)
        self._show(console, augment_markdown(document, command_line("bench augment")))
        return document


@dataclass(frozen=True, kw_only=True)
class BenchStep(_TrainingBench):
    """Time the parts of a training step and the whole of it, on synthetic images."""

    config: Annotated[StepBenchConfig, _Flattened] = field(default_factory=StepBenchConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.step import bench_step, step_markdown

        document = bench_step(self.config, self.setting, self.speed, lambda line: say(console, line))
        self._show(console, step_markdown(document, command_line("bench step")))
        return document


@dataclass(frozen=True, kw_only=True)
class BenchTrainTime(_TrainingBench):
    """Time LeOCLR and MoCo-v2 in interleaved rounds, on synthetic and on real images."""

    data: Path | None = None
    """As in pretrain; without it, synthetic images only."""
    config: Annotated[TrainTimeConfig, _Flattened] = field(default_factory=TrainTimeConfig)
    rounds: Annotated[RoundsConfig, _Flattened] = field(default_factory=RoundsConfig)
    """How long is measured."""
    plot: Path | None = None
    """Draw the rates into this file (.svg, .png or .pdf)."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.train_time import (
            bench_train_time,
            plot_train_time,
            require_plot_format,
            train_time_markdown,
        )

        if self.plot is not None:
            require_plot_format(self.plot)
        document = bench_train_time(
            self.config, self.rounds, self.setting, self.speed, self.data, lambda line: say(console, line)
        )
        self._show(console, train_time_markdown(document, command_line("bench train-time", self.data)))
        if self.plot is not None:
            plot_train_time(document, self.plot)
        return document


@dataclass(frozen=True, kw_only=True)
class BenchScaling(_TrainingBench):
    """Time training on 1 to N ranks of this machine, in interleaved rounds, with its share of communication."""

    config: Annotated[ScalingConfig, _Flattened] = field(default_factory=ScalingConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.scaling import bench_scaling, scaling_markdown

        document = bench_scaling(self.config, self.setting, self.speed, lambda line: say(console, line))
        self._show(console, scaling_markdown(document, command_line("bench scaling")))
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
