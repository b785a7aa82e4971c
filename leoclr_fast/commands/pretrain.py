"""`leoclr-fast pretrain`: the main job."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, parse_flags, say
from dataset_tools.images import open_image
from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from leoclr_fast.config import MonitorConfig, ResultConfig, RunConfig, SpeedConfig
from leoclr_fast.config_file import RETIRED
from leoclr_fast.recipes import RECIPES, get_recipe

log = logging.getLogger(__name__)

_Flattened = tyro.conf.arg(name="")
_FITTING = ((48, "leoclr_cifar10"), (128, "leoclr_stl10"))
"""Up to this many pixels of the shorter side -> the recipe."""


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
        from leoclr_fast.training.loop import pretrain

        config = RunConfig(recipe=self.recipe, result=self.result, speed=self.speed, monitor=self.monitor)
        summary = pretrain(config, self.data, self.out, resume=self.resume, max_steps=self.max_steps, console=console)
        if summary:
            say(console, outcome(summary))
        return summary


def outcome(summary: dict[str, Any]) -> str:
    """The summary of `leoclr_fast.training.loop.pretrain`, for people."""
    parts = [f"{summary['recipe']}: {'finished' if summary['complete'] else 'stopped early'}"]
    if summary["images_per_s"] is not None:
        parts.append(f"{summary['images_per_s']:,.0f} images/s")
    if summary["knn_top1"] is not None:
        before = summary.get("knn_top1_untrained")
        parts.append(
            f"kNN top-1 {summary['knn_top1']:.2f} %" + (f" (untrained {before:.2f} %)" if before is not None else "")
        )
    return ", ".join(parts)


def parse_pretrain(arguments: list[str]) -> Pretrain:
    """`RECIPE [FLAG …]` as a command; the defaults of its flags are those of the recipe. Raises ValueError."""
    recipe_name, prog = "leoclr_imagenet_200ep", "leoclr-fast pretrain"
    if arguments and not arguments[0].startswith("-"):
        recipe_name, *arguments = arguments
        prog = f"{prog} {recipe_name}"
    elif "-h" not in arguments and "--help" not in arguments:
        raise ValueError(
            f"pretrain needs a recipe first: leoclr-fast pretrain RECIPE …; {_suggestion(arguments)}"
            f"recipes: {', '.join(RECIPES)}"
        )
    recipe = get_recipe(recipe_name)
    defaults = Pretrain(
        data=tyro.MISSING,
        out=tyro.MISSING,
        recipe=recipe.recipe,
        result=recipe.result,
        speed=recipe.speed,
        monitor=recipe.monitor,
    )
    of_recipe = (RECIPES[recipe_name].__doc__ or "").strip()
    description = f"{Pretrain.__doc__}\n\nRecipe {recipe_name}: {of_recipe}\n\nAll recipes: {', '.join(RECIPES)}."
    return parse_flags(Pretrain, _without_retired(arguments), prog, default=defaults, description=description)


def _without_retired(arguments: list[str]) -> list[str]:
    """The flags that there still are; the others are named."""
    retired = {f"--{name.replace('_', '-')}" for name in RETIRED}
    kept, given = list[str](), list(arguments)
    while given:
        flag, has_value, value = given[0].partition("=")
        if flag not in retired:
            kept.append(given.pop(0))
            continue
        del given[0]
        if not has_value and given and not given[0].startswith("--"):
            value = given.pop(0)
        if not re.fullmatch(r"(\d+(\.\d*)?|True|False)?", value, re.ASCII):
            raise ValueError(f"{flag} {value} is not allowed: give a number of seconds, or leave it away")
        log.warning("%s is no longer there, and changes nothing", flag)
    return kept


def _suggestion(arguments: list[str]) -> str:
    """The recipe that fits the data of a command line, by their number and size; nothing where it cannot be told."""
    place = next((flag.partition("=")[2] for flag in arguments if flag.startswith("--data=")), None)
    if place is None and "--data" in arguments[:-1]:
        place = arguments[arguments.index("--data") + 1]
    if place is None:
        return ""
    try:
        split = choose_splits(open_source(place, quietly=True)).pretrain
        side = median(min(open_image(split.read(i)).size) for i in range(0, len(split), max(1, len(split) // 16)))
    except (ValueError, OSError, RuntimeError):
        return ""
    name = next((name for limit, name in _FITTING if side <= limit), "leoclr_imagenet_200ep")
    result = get_recipe(name).result
    queue_size = len(split) // 2 // result.batch_size * result.batch_size  # half: no image's own keys are in it
    smaller = f" --method.queue-size {queue_size}" if 0 < queue_size < result.method.queue_size / 2 else ""
    return f"{name}{smaller} fits the {len(split):,} images of about {side:g} pixels at {place}; "
