"""`leoclr-fast demo`: everything once, on drawn images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.commands.pretrain import outcome
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
        from dataset_tools.demo_data import write_demo_data
        from dataset_tools.sources import open_source
        from leoclr_fast.method.methods import METHODS
        from leoclr_fast.run.folder import RunFolder
        from leoclr_fast.run.preview import write_preview
        from leoclr_fast.training.loop import pretrain

        start = time.perf_counter()
        recipe = get_recipe(f"{self.method}_demo")
        changes: dict[str, Any] = {"seed": self.seed, "max_images": self.max_images}
        if self.epochs is not None:
            changes["epochs"] = self.epochs
        result = replace(recipe.result, **changes)
        config = replace(recipe, result=result, speed=replace(recipe.speed, device=self.device))
        config = replace(config, monitor=replace(recipe.monitor, knn="on"))  # before and after, whatever --max-steps
        data, run, preview = self.out / "data", self.out / "run", self.out / "preview.png"
        write_demo_data(data)
        views = METHODS[result.method.name].views
        write_preview(preview, open_source(data).splits["train"], views, result.views, seed=result.seed)
        trained = pretrain(config, data, run, max_steps=self.max_steps, console=console)
        summary = {name: trained.get(name) for name in ("knn_top1", "knn_top1_untrained", "complete", "images_per_s")}
        summary |= {"recipe": config.recipe, "seconds": time.perf_counter() - start, "data": str(data)}
        summary |= {"run": str(run), "preview": str(preview), "report": str(RunFolder(run).report_file)}
        say(console, outcome(summary))
        say(console, f"views: {summary['preview']}   run: {summary['run']}   data: {summary['data']}")
        say(console, f"report: {summary['report']}")
        return summary
