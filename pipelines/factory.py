"""The one door to the loaders: picks one, and says which and why."""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace

import torch

from dataset_tools.sources import Split
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.resident_images import estimate_decoded_bytes
from pipelines.resident_loader import ResidentLoader
from pipelines.synthetic_loader import SyntheticLoader
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)

LOADERS: dict[str, type[Loader]] = {
    loader.name: loader for loader in (ResidentLoader, TorchvisionLoader, SyntheticLoader)
}


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

    Raises ValueError for an unknown name (the nearest names are offered).
    """
    name = choose_loader(split, config) if config.name == "auto" else config.name
    if name not in LOADERS:
        allowed = ["auto", *LOADERS]
        nearest = difflib.get_close_matches(name, allowed, n=2)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise ValueError(f"there is no loader {name!r}; {hint}Allowed: {', '.join(allowed)}.")
    return LOADERS[name](split, views, view_config, config, order, seed=seed, device=device)


def choose_loader(split: Split, config: LoaderConfig) -> str:
    """The name that ``auto`` stands for with this split; logs the choice and its reason."""
    gib = estimate_decoded_bytes(split) / 2**30
    if gib <= config.resident_limit_gib:
        name, reason = "resident", f"the decoded images take about {gib:.2f} GiB"
    else:
        name, reason = "torchvision", f"the decoded images would take about {gib:.0f} GiB"
    log.info("loader %s: %s (resident up to %g GiB)", name, reason, config.resident_limit_gib)
    return name


def settle_loader(split: Split, config: LoaderConfig) -> LoaderConfig:
    """``config`` with ``auto`` replaced by the loader it stands for, so that the choice is made and told once."""
    return replace(config, name=choose_loader(split, config)) if config.name == "auto" else config
