"""What an evaluation that trains something is told beside its protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from leoclr_fast.config import SpeedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Whose weights, how many and how large images, where it works, and how fast."""

    speed: SpeedConfig = field(default_factory=SpeedConfig)
    untrained: bool = False
    """Of a run, the weights that it began with."""
    image_size: int | None = None
    """Side of an image, pixels; the pretraining's if not given."""
    max_images: int | None = None
    """At most this many images to learn from, and to test on."""
    out: Path | None = None
    """Where it works; by default a folder in the run, or beside a file of weights: see `Subject.evaluations`."""
    max_steps: int | None = None
    """Pause when so many steps of training are done in all; the same evaluation without it continues."""
    checkpoint_every_s: float = 60.0
    """A checkpoint at the end of an epoch, once the last one is so many seconds old."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max-steps {self.max_steps} is not allowed: give at least 1")
