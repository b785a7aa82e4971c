"""What every command that evaluates weights is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dataset_tools.command_line import CommonFlags
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
    """Where it works, and continues after a kill; by default a folder in the run that the settings determine."""
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
            checkpoint_every_s=self.checkpoint_every_s,
        )
