"""From images per second on one GPU to the hours, the energy and the cost of a whole pretraining. A projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGENET_IMAGES = 1_281_167
_J_PER_KWH = 3.6e6
_S_PER_HOUR = 3600.0

FORMULA = (
    "hours = epochs x images / (images/s x GPUs) / 3600, as if N GPUs were N times as fast as the one measured; "
    "kWh = J per image x epochs x images / 3.6e6, of the GPUs alone; cost = hours x GPUs x price of a GPU hour"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """The pretraining that is projected, not run."""

    epochs: int = 200
    images: int = IMAGENET_IMAGES
    """Of one epoch (ImageNet-1K: 1,281,167)."""
    gpus: int = 8
    price_per_gpu_hour: float | None = None
    """In any currency; no cost is projected without it."""

    def __post_init__(self) -> None:
        for name in ("epochs", "images", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"a projection to {getattr(self, name)} {name} is not allowed: give at least 1")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour < 0:
            raise ValueError(f"a price of {self.price_per_gpu_hour} is not allowed: give 0 or more")


def project(config: ProjectionConfig, images_per_s: float, energy_per_image_j: float | None) -> dict[str, Any]:
    """hours, gpu_hours, energy_kwh and cost of the whole pretraining; the last two None where what they need is.

    images_per_s: of one GPU. See `FORMULA`.
    """
    total = config.epochs * config.images
    gpu_hours = total / images_per_s / _S_PER_HOUR
    return {
        "hours": gpu_hours / config.gpus,
        "gpu_hours": gpu_hours,
        "energy_kwh": None if energy_per_image_j is None else energy_per_image_j * total / _J_PER_KWH,
        "cost": None if config.price_per_gpu_hour is None else gpu_hours * config.price_per_gpu_hour,
    }
