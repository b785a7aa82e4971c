"""The one door to the loaders: picks one, and says which and why."""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch

from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from pipelines.byte_readers import base_of
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.resident_images import estimate_decoded_bytes
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)

LOADERS = {
    "resident": "pipelines.resident_loader.ResidentLoader",
    "dali": "pipelines.dali_loader.DaliLoader",
    "ffcv": "pipelines.ffcv_loader.FfcvLoader",
    "nvjpeg": "pipelines.nvjpeg_loader.NvjpegLoader",
    "torchvision": "pipelines.torchvision_loader.TorchvisionLoader",
    "synthetic": "pipelines.synthetic_loader.SyntheticLoader",
}
"""Name of a loader -> its class, imported when it is asked for."""

_PREFERRED = {"cuda": ("dali", "nvjpeg", "ffcv", "torchvision"), "cpu": ("ffcv", "dali", "nvjpeg", "torchvision")}
"""Of the loaders that decode in every epoch."""
_DRAWBACKS = {
    ("nvjpeg", "cuda"): "for machines without DALI",
    ("ffcv", "cuda"): "it decodes on the CPU",
    ("torchvision", "cuda"): "it decodes on the CPU",
    ("dali", "cpu"): "slower on a .beton",
    ("torchvision", "cpu"): "slower",
}
"""Name of a loader, device -> why those before it are preferred."""


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
    if name not in LOADERS:
        allowed = ["auto", *LOADERS]
        nearest = difflib.get_close_matches(name, allowed, n=2)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise ValueError(f"there is no loader {name!r}; {hint}Allowed: {', '.join(allowed)}.")
    return loader_class(name)(split, views, view_config, config, order, seed=seed, device=device)


def loader_class(name: str) -> type[Loader]:
    """The class of a name in `LOADERS`."""
    module, _, found = LOADERS[name].rpartition(".")
    loader: type[Loader] = getattr(import_module(module), found)
    return loader


def choose_loader(split: Split, config: LoaderConfig, device: torch.device | None = None) -> str:
    """The name that ``auto`` stands for with this split; logs the choice and its reason.

    device: by default CUDA where there is some: DALI decodes there, or torchvision's nvJPEG. On a CPU FFCV, which reads
    .betons, is the fastest, then DALI, then torchvision's worker processes (benchmarks/results/loaders_cpu.md).
    """
    gib = estimate_decoded_bytes(split) / 2**30
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if gib <= config.resident_limit_gib:
        name, takes, others = "resident", "take", "the others decode in every epoch"
    else:
        name, others = _best_decoder(split, device)
        takes = "would take"
    size = f"the decoded images {takes} about {gib:.{2 if name == 'resident' else 0}f} GiB"
    log.info("loader %s: %s (resident up to %g GiB); %s", name, size, config.resident_limit_gib, others)
    return name


def settle_loader(split: Split, config: LoaderConfig, device: torch.device | None = None) -> LoaderConfig:
    """``config`` with ``auto`` replaced by the loader it stands for, so that the choice is made and told once."""
    return replace(config, name=choose_loader(split, config, device)) if config.name == "auto" else config


def _best_decoder(split: Split, device: torch.device) -> tuple[str, str]:
    """The first loader of `_PREFERRED` with no obstacle; and for each other one, why not."""
    chosen, reasons = "", []
    for name in _PREFERRED[device.type]:
        if reason := _obstacle(name, split, device):
            reasons.append(f"{name} ({reason})")
        elif chosen:
            reasons.append(f"{name} ({_DRAWBACKS[name, device.type]})")
        else:
            chosen = name
    return chosen, f"not {', '.join(reasons)}"


def _obstacle(name: str, split: Split, device: torch.device) -> str | None:
    """Why this loader cannot be taken; None if it can."""
    match name:
        case "dali" if not _is_installed("nvidia.dali"):
            return "not installed: pip install 'leoclr-fast[dali]'"
        case "ffcv" if not _is_beton(split):
            return "it reads .betons alone"
        case "ffcv" if not _is_installed("ffcv"):
            return "not installed: make ffcv"
        case "nvjpeg" if device.type == "cpu":
            return "it needs a GPU"
        case "nvjpeg":
            return _nvjpeg_obstacle(device)
    return None


def _nvjpeg_obstacle(device: torch.device) -> str | None:
    from pipelines.nvjpeg_loader import nvjpeg_obstacle

    return nvjpeg_obstacle(device)


def _is_beton(split: Split) -> bool:
    base, _ = base_of(split)
    return isinstance(base, ConvertedSplit) and base.files[0].path.suffix == ".beton"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False
