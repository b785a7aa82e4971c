"""What the sections of the suite are told, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.config import SpeedConfig

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a section found."""

    result: dict[str, Any]
    """Plain JSON."""
    markdown: str
    """The same for people, without a heading."""


class UnavailableError(RuntimeError):
    """A section cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteConfig:
    """The same for all sections."""

    device: str = "auto"
    tiny: bool = False
    """Sizes that a CPU gets through in seconds: to see that everything works, not to measure."""
    precision: str = "bf16"
    """Of train-time, profile and cifar10; step measures bf16 and fp16."""
    data: Path | None = None
    """CIFAR-10, in any form that pretrain reads."""
    photographs: Path | None = None
    """JPEGs as large as a view or larger, in any form that pretrain reads; `data` if not given."""
    epochs: int = 8
    """Of the pretraining on it."""
    soft_limit_s: float = 60.0
    """Within which the section should come to an end by itself."""
    keep: Callable[[Answer], None] = lambda _: None
    """Is given what has been found so far, after every part: it stands if the section is stopped before its end."""

    @property
    def setting(self) -> BenchSetting:
        """ResNet-50, 224 pixels, batch 256, K = 65,536; or the tiny one."""
        if not self.tiny:
            return BenchSetting()
        return BenchSetting(recipe="leoclr_demo", batch_size=16, queue_size=256)

    def speed(self, precision: str | None = None) -> SpeedConfig:
        """As `pretrain` would run it."""
        return SpeedConfig(device=self.device, precision=precision or self.precision)  # type: ignore[arg-type]
