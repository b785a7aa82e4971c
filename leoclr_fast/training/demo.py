"""The main job on drawn images: data, pretraining, kNN before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.demo_data import write_demo_data
from dataset_tools.sources import open_source
from leoclr_fast.config import RunConfig
from leoclr_fast.method.methods import METHODS
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.preview import write_preview
from leoclr_fast.training.loop import pretrain


def run_demo(
    config: RunConfig, out: Path, *, max_steps: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Draw `out/data`, pretrain into `out/run`; running it again continues or finds everything done.

    Returns the summary: knn_top1 and knn_top1_untrained (percent), seconds (all of it), run, data, preview, report.
    """
    start = time.perf_counter()
    data, run, preview = out / "data", out / "run", out / "preview.png"
    write_demo_data(data)
    views = METHODS[config.result.method.name].views
    write_preview(preview, open_source(data).splits["train"], views, config.result.views, seed=config.result.seed)
    summary = pretrain(config, data, run, max_steps=max_steps, console=console)
    return {
        "knn_top1": summary.get("knn_top1"),
        "knn_top1_untrained": summary.get("knn_top1_untrained"),
        "seconds": time.perf_counter() - start,
        "run": str(run),
        "data": str(data),
        "preview": str(preview),
        "report": str(RunFolder(run).report_file),
        "recipe": config.recipe,
        "complete": summary.get("complete"),
        "images_per_s": summary.get("images_per_s"),
    }
