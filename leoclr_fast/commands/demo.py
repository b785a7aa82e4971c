"""`leoclr-fast demo`: everything once, on drawn images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.commands.outcome import outcome
from leoclr_fast.recipes import get_recipe


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

        from leoclr_fast.training.demo import run_demo

        recipe = get_recipe(f"{self.method}_demo")
        result = replace(
            recipe.result,
            seed=self.seed,
            max_images=self.max_images,
            epochs=recipe.result.epochs if self.epochs is None else self.epochs,
        )
        config = replace(recipe, result=result, speed=replace(recipe.speed, device=self.device))
        summary = run_demo(config, self.out, max_steps=self.max_steps, console=console)
        say(console, outcome(summary))
        say(console, f"views: {summary['preview']}   run: {summary['run']}   data: {summary['data']}")
        say(console, f"report: {summary['report']}")
        return summary
