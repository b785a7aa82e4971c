"""The one door to the loaders: picks one, and says which and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module

import torch

from dataset_tools.limits import unknown
from dataset_tools.sources import Split
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.resident_loader import ResidentLoader, estimate_decoded_bytes, room_for_pixels
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)

LOADERS: dict[str, str | type[Loader]] = {
    "resident": "pipelines.resident_loader.ResidentLoader",
    "dali": "pipelines.dali_loader.DaliLoader",
    "ffcv": "pipelines.ffcv_loader.FfcvLoader",
    "nvjpeg": "pipelines.nvjpeg_loader.NvjpegLoader",
    "torchvision": "pipelines.torchvision_loader.TorchvisionLoader",
    "synthetic": "pipelines.synthetic_loader.SyntheticLoader",
}
"""Name of a loader -> its class, or where that is: imported when it is asked for. A new loader is a line here."""


def make_loader(
    split: Split,
    views: ViewRecipe,
    view_config: ViewConfig,
    config: LoaderConfig,
    order: Order,
    *,
    seed: int,
    device: torch.device,
) -> Loader:
    """A loader of ``split``; ``config.name`` is ``auto`` or a name in `LOADERS`.

    Raises ValueError for an unknown name (the nearest names are offered), ImportError for a loader whose package is
    not installed.
    """
    name = choose_loader(split, config, device) if config.name == "auto" else config.name
    return loader_class(name)(split, views, view_config, config, order, seed=seed, device=device)


def loader_class(name: str) -> type[Loader]:
    """The class of a name in `LOADERS`. Raises ValueError for an unknown one."""
    if name not in LOADERS:
        raise ValueError(unknown("loader", name, ["auto", *LOADERS]))
    entry = LOADERS[name]
    if isinstance(entry, str):
        module, _, found = entry.rpartition(".")
        loader: type[Loader] = getattr(import_module(module), found)
        return loader
    return entry


def shows_images(config: LoaderConfig) -> bool:
    """Whether the loader hands out the images of its split, and not noise. Raises ValueError for an unknown name."""
    return config.name == "auto" or loader_class(config.name).shows_images


def choose_loader(split: Split, config: LoaderConfig, device: torch.device) -> str:
    """The name that ``auto`` stands for with this split; logs the choice and its reason.

    On a GPU DALI decodes, or torchvision's nvJPEG. On a CPU FFCV, which reads .betons, is the fastest, then DALI, then
    torchvision's worker processes (benchmarks/results/loaders_cpu.md).
    """
    gib, limit_gib = estimate_decoded_bytes(split) / 2**30, config.resident_limit_gib
    if gib <= limit_gib:
        limit_gib = min(limit_gib, room_for_pixels(device) / 2**30)
    if gib <= limit_gib:
        name, size = ResidentLoader.name, f"take about {gib:.2f}"
        others = "the others decode in every epoch"
    else:
        name, others = _best_decoder(split, device)
        size = f"would take about {gib:.0f}"
    limit = f"(resident up to {limit_gib:g} GiB)"
    log.info("loader %s: the decoded images %s GiB %s; %s", name, size, limit, others)
    return name


def settle_loader(split: Split, config: LoaderConfig, device: torch.device) -> LoaderConfig:
    """``config`` with ``auto`` replaced by the loader it stands for, so that the choice is made and logged once."""
    return replace(config, name=choose_loader(split, config, device)) if config.name == "auto" else config


def _best_decoder(split: Split, device: torch.device) -> tuple[str, str]:
    """The first of the loaders that decode in every epoch without an obstacle; and for each other one, why not."""
    classes = [loader_class(name) for name in LOADERS]
    candidates = [loader for loader in classes if device.type in loader.auto_places]
    chosen, reasons = "", []
    for loader in sorted(candidates, key=lambda loader: loader.auto_places[device.type]):
        if chosen:  # the others are not even tried: that may take a while, and memory of a GPU
            reasons.append(f"{loader.name} ({loader.drawbacks.get(device.type, 'slower')})")
        elif reason := loader.obstacle(split, device):
            reasons.append(f"{loader.name} ({reason})")
        else:
            chosen = loader.name
    return chosen, f"not {', '.join(reasons)}"
