"""What a benchmark of training runs: a recipe with changes, the same for every method; and how far it is from the
paper's setting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from leoclr_fast.config import MethodName, ResultConfig, SpeedConfig
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.recipes import get_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetting:
    """Network, sizes and batch. What is not given is the recipe's."""

    recipe: str = "leoclr_imagenet_200ep"
    """Where everything comes from but the method; the default is the paper's setting."""
    arch: Literal["resnet18", "resnet34", "resnet50"] | None = None
    stem: Literal["imagenet", "small"] | None = None
    width_multiplier: float | None = None
    image_size: int | None = None
    """Side of a view, pixels."""
    batch_size: int | None = None
    queue_size: int | None = None
    key_batchnorm: Literal["shuffle", "split", "sync", "ema", "plain"] | None = None
    key_passes: Literal["separate", "joint"] | None = None
    seed: int = 0

    def result(self, method: MethodName) -> ResultConfig:
        """The configuration of a method. Raises ValueError for an unknown recipe or sizes that do not fit."""
        base = get_recipe(self.recipe).result
        backbone = _changed(base.backbone, arch=self.arch, stem=self.stem, width_multiplier=self.width_multiplier)
        batch_size = self.batch_size or base.batch_size
        config = _changed(
            base.method,
            name=method,
            queue_size=self.queue_size,
            key_batchnorm=self.key_batchnorm,
            key_passes=self.key_passes,
        )
        if config.key_batchnorm == "shuffle":  # on one GPU the same thing, by its own name
            config = replace(config, key_batchnorm="split")
        return replace(
            base,
            batch_size=batch_size,
            seed=self.seed,
            backbone=backbone,
            method=config,
            views=_changed(base.views, image_size=self.image_size),
        )


def departures_from_paper(result: ResultConfig) -> list[str]:
    """What differs from the paper's setting on one GPU: ResNet-50, 224 pixels, K = 65,536, separate key passes, split
    batch-norm, augmentation included. Empty for the paper's setting itself.
    """
    given_and_meant = {
        "arch": (result.backbone.arch, "resnet50"),
        "stem": (result.backbone.stem, "imagenet"),
        "width": (result.backbone.width_multiplier, 1.0),
        "image size": (result.views.image_size, 224),
        "queue": (result.method.queue_size, 65_536),
        "key passes": (result.method.key_passes, "separate"),
        "key batch-norm": (result.method.key_batchnorm, "split"),
        "blur probability": (result.views.blur_probability, 0.5),
    }
    return [f"{name} {given} (not {meant})" for name, (given, meant) in given_and_meant.items() if given != meant]


def setting_header(result: ResultConfig, speed: SpeedConfig, device: torch.device) -> str:
    """One line that says what was run; it stands above every output."""
    departures = departures_from_paper(result)
    kind = "paper setting" if not departures else f"not the paper setting: {', '.join(departures)}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{result.backbone.arch}, {result.views.image_size} px, batch {result.batch_size}, K = "
        f"{result.method.queue_size:,}, key passes {result.method.key_passes}, key batch-norm "
        f"{result.method.key_batchnorm}, augmentation included, {speed.precision}, torch {torch.__version__}, {where} "
        f"[{kind}]"
    )


def bench_device(speed: SpeedConfig) -> torch.device:
    """The device of a benchmark of one device, made the current one, so that events are recorded there.

    Raises ValueError for a device that this machine does not have, and as `require_one_process`.
    """
    require_one_process()
    device = resolve_device(speed.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def require_one_process() -> None:
    """Raises ValueError under torchrun with several ranks: these benchmarks measure one device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"this benchmark measures one device, but torchrun started {world_size} processes; start it without "
            "torchrun"
        )


def _changed(config: Any, **changes: Any) -> Any:
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
