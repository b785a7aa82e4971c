"""The command line: `leoclr-fast <command>`, the same as `python -m leoclr_fast <command>`.

Each command is a dataclass whose fields are its flags, typed and explained by tyro, and a method `run` that returns
one JSON document. What a command does lives elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.cli import COMMANDS as DATASET_COMMANDS
from dataset_tools.command_line import Command, CommonFlags, parse_flags, print_commands, run_command_line, say, unknown
from leoclr_fast.config import MonitorConfig, ResultConfig, RunConfig, SpeedConfig
from leoclr_fast.recipes import RECIPES, get_recipe
from pipelines.config import LoaderConfig

_Flattened = tyro.conf.arg(name="")
_PAPER = "LeOCLR: Leveraging Original Images for Contrastive Learning of Visual Representations (TMLR 2024)"


@dataclass(frozen=True, kw_only=True)
class Pretrain(CommonFlags):
    """Pretrain a backbone: leoclr-fast pretrain RECIPE --data PATH --out RUN."""

    data: Path
    """An image folder, a tar of one, CIFAR-10/100 or STL-10, with or without train/val/test/unlabeled splits."""
    out: Path
    """The run folder."""
    resume: str = "auto"
    """auto: continue the run in --out, if any. never: only a new run. A path: start from that checkpoint."""
    max_steps: int | None = None
    """Stop when this many steps are done in all; the same command without it continues."""
    recipe: tyro.conf.Suppress[str] = ""
    result: Annotated[ResultConfig, _Flattened]
    """Changes the result."""
    speed: Annotated[SpeedConfig, _Flattened]
    """Changes only the speed."""
    monitor: MonitorConfig
    """What is watched and kept on the way."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.train import pretrain

        config = RunConfig(recipe=self.recipe, result=self.result, speed=self.speed, monitor=self.monitor)
        summary = pretrain(config, self.data, self.out, resume=self.resume, max_steps=self.max_steps, console=console)
        if summary:
            say(console, _sentence(summary))
        return summary


@dataclass(frozen=True, kw_only=True)
class Demo(CommonFlags):
    """The main job on drawn images, in minutes: data, pretraining, kNN before and after."""

    out: Path = Path("runs/demo")
    """Gets `data` (an image folder), `run` (the run folder) and `preview.png`."""
    method: str = "leoclr"
    """leoclr or mocov2."""
    epochs: int | None = None
    """Epochs; the recipe's if not given."""
    seed: int = 0
    max_images: int | None = None
    """Pretrain on at most this many images."""
    max_steps: int | None = None
    """Stop when this many steps are done."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataclasses import replace

        from leoclr_fast.demo import run_demo

        recipe = get_recipe(f"{self.method}_demo")
        result = replace(
            recipe.result,
            seed=self.seed,
            max_images=self.max_images,
            epochs=recipe.result.epochs if self.epochs is None else self.epochs,
        )
        config = replace(recipe, result=result, speed=replace(recipe.speed, device=self.device))
        summary = run_demo(config, self.out, max_steps=self.max_steps, console=console)
        say(console, _sentence(summary))
        say(console, f"views: {summary['preview']}   run: {summary['run']}   data: {summary['data']}")
        say(console, f"report: {summary['report']}")
        return summary


@dataclass(frozen=True, kw_only=True)
class Knn(CommonFlags):
    """Weighted kNN accuracy of a run's frozen backbone."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """The --out of a pretrain."""
    data: Path
    """As in pretrain: the bank is train, the queries are val, else test, else a held-out part of train."""
    k: int | None = None
    """Neighbours that vote; the run's own if not given."""
    temperature: float | None = None
    """Weight of a neighbour: exp(cosine similarity / temperature); the run's own if not given."""
    batch_size: int = 256
    """Images per forward pass."""
    max_images: int | None = None
    """At most this many images in the bank, and in the queries."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the backbone."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Changes only the speed."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.run_knn import run_knn

        result = run_knn(
            self.run_folder,
            self.data,
            SpeedConfig(device=self.device, precision=self.precision, loader=self.loader),
            k=self.k,
            temperature=self.temperature,
            batch_size=self.batch_size,
            max_images=self.max_images,
        )
        if result:
            say(
                console,
                f"kNN top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % (k = {result['k']}, temperature "
                f"{result['temperature']:g}; {result['bank_images']:,} images in the bank, "
                f"{result['query_images']:,} queries)"
                if result["top1"] is not None
                else result["note"],
            )
        return result


@dataclass(frozen=True, kw_only=True)
class Preview(CommonFlags):
    """A contact sheet: each image with its crop boxes, and all its views as training sees them."""

    data: Path
    """As in pretrain."""
    out: Path
    """The PNG to write."""
    recipe: str = "leoclr_imagenet_200ep"
    """Whose views."""
    rows: int = 8
    """Images."""
    seed: int = 0
    max_images: int | None = None
    """Choose from at most this many images."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.sources import open_source
        from dataset_tools.splits import choose_splits
        from dataset_tools.subsets import limited
        from leoclr_fast.methods import METHODS
        from leoclr_fast.preview import write_preview

        if self.rows < 1:
            raise ValueError(f"--rows {self.rows} is not allowed: give at least 1")
        result = get_recipe(self.recipe).result
        split = limited(choose_splits(open_source(self.data)).pretrain, self.max_images)
        views = METHODS[result.method.name].views
        rows = write_preview(self.out, split, views, result.views, seed=self.seed, rows=self.rows)
        say(console, f"{rows} images and their views: {self.out}")
        return {"out": str(self.out), "rows": rows, "views": [view.name for view in views]}


@dataclass(frozen=True, kw_only=True)
class Report(CommonFlags):
    """One HTML page about a run, or about several side by side: report RUN [RUN …] --out FILE.html."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """The --out of each pretrain; they may be running still."""
    out: Path | None = None
    """The page to write; report.html in the run folder if there is one RUN and this is not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.report.page import write_report
        from leoclr_fast.run_folder import RunFolder

        if not self.runs:
            raise ValueError("report needs a run folder: leoclr-fast report RUN [RUN …] --out FILE.html")
        if self.out is None and len(self.runs) > 1:
            raise ValueError("a report of several runs needs a place of its own: give --out FILE.html")
        out = RunFolder(self.runs[0]).report_file if self.out is None else self.out
        document = write_report(list(self.runs), out)
        say(console, f"report: {out} ({document['bytes'] / 1e3:,.0f} kB)")
        return document


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


COMMANDS: dict[str, type[Any]] = {
    "demo": Demo,
    **DATASET_COMMANDS,
    "pretrain": Pretrain,
    "knn": Knn,
    "preview": Preview,
    "report": Report,
    "watch": Watch,
}
_SHORTHANDS = {"--loader": "--loader.name"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (`sys.argv` by default) and exit: 0 done, 1 failed, 2 misused, 130 stopped by a signal."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """As `main`, but returns the exit code."""
    return run_command_line(parse_command, arguments)


def parse_command(arguments: list[str]) -> Command | None:
    """A command line as a command, not yet run; None where help was printed instead. Raises ValueError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_overview()
        return None
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS))
    rest = [_without_shorthand(argument) for argument in rest]
    prog = f"leoclr-fast {name}"
    if name != "pretrain":
        return parse_flags(COMMANDS[name], rest, prog)
    recipe_name = "leoclr_imagenet_200ep"
    if rest and not rest[0].startswith("-"):
        recipe_name = rest.pop(0)
        prog = f"{prog} {recipe_name}"
    elif "-h" not in rest and "--help" not in rest:
        raise ValueError(f"pretrain needs a recipe first: leoclr-fast pretrain RECIPE …; recipes: {', '.join(RECIPES)}")
    recipe = get_recipe(recipe_name)
    defaults = Pretrain(
        data=tyro.MISSING,
        out=tyro.MISSING,
        recipe=recipe.recipe,
        result=recipe.result,
        speed=recipe.speed,
        monitor=recipe.monitor,
    )
    return parse_flags(Pretrain, rest, prog, default=defaults, description=_recipe_help(recipe_name))


def _without_shorthand(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return f"{_SHORTHANDS.get(flag, flag)}{equals}{value}"


def _recipe_help(name: str) -> str:
    docstring = (RECIPES[name].__doc__ or "").strip()
    return f"{Pretrain.__doc__}\n\nRecipe {name}: {docstring}\n\nAll recipes: {', '.join(RECIPES)}."


def _print_overview() -> None:
    print(f"leoclr-fast: pretrain LeOCLR, and MoCo-v2 beside it.\n{_PAPER}\n")
    print_commands(COMMANDS)
    print("\nleoclr-fast COMMAND --help lists the flags of a command. Recipes of pretrain:")
    for name, recipe in RECIPES.items():
        print(f"  {name:24} {(recipe.__doc__ or '').strip().splitlines()[0]}")


def _sentence(summary: dict[str, Any]) -> str:
    parts = [f"{summary['recipe']}: {'finished' if summary['complete'] else 'stopped early'}"]
    if summary["images_per_s"] is not None:
        parts.append(f"{summary['images_per_s']:,.0f} images/s")
    if summary["knn_top1"] is not None:
        before = summary.get("knn_top1_untrained")
        parts.append(
            f"kNN top-1 {summary['knn_top1']:.2f} %" + (f" (untrained {before:.2f} %)" if before is not None else "")
        )
    return ", ".join(parts)
