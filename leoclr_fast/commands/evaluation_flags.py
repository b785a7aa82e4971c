"""What every command that evaluates weights is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.config import SpeedConfig
from leoclr_fast.evaluate.options import EvaluationOptions
from pipelines.config import LoaderConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(CommonFlags):
    """Whose weights, on which machine, by which loader."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """The --out of a pretrain (its final weights, else its newest checkpoint), or a final.safetensors."""
    untrained: bool = False
    """Of a run, the weights that it began with: what pretraining is measured against."""
    image_size: int | None = None
    """Side of an image, pixels; the pretraining's if not given."""
    max_images: int | None = None
    """At most this many images to learn from, and to test on: for trying out."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the network: bf16 and fp16 by autocast."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Changes only the speed."""

    @property
    def speed(self) -> SpeedConfig:
        return SpeedConfig(device=self.device, precision=self.precision, loader=self.loader)


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluationFlags(EvaluationFlags):
    """The same for evaluations that train something, and can be resumed."""

    out: Path | None = None
    """Where it works, and continues after a kill; by default a folder that the settings determine, in RUN/evaluations
    or, of a file, in WEIGHTS.evaluations beside it."""
    max_steps: int | None = None
    """Pause when so many steps are done in all, without a result; the same command without it continues."""
    checkpoint_every_s: float = 60.0
    """A checkpoint at the end of an epoch, once the last one is so many seconds old."""

    @property
    def options(self) -> EvaluationOptions:
        return EvaluationOptions(
            speed=self.speed,
            untrained=self.untrained,
            image_size=self.image_size,
            max_images=self.max_images,
            out=self.out,
            max_steps=self.max_steps,
            checkpoint_every_s=self.checkpoint_every_s,
        )


def is_paused(result: dict[str, Any]) -> bool:
    """Whether --max-steps ended an evaluation before it had a result."""
    return result.get("complete") is False


def say_paused(console: Console, result: dict[str, Any]) -> None:
    """What a paused evaluation prints."""
    say(
        console,
        f"paused after step {result['step']:,}, as --max-steps asks, in {result['out']}; there is no result yet, and "
        "the same command without --max-steps continues",
    )
