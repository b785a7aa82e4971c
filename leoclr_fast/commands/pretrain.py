"""`leoclr-fast pretrain`: the main job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.commands.outcome import outcome
from leoclr_fast.config import MonitorConfig, ResultConfig, RunConfig, SpeedConfig

_Flattened = tyro.conf.arg(name="")


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
