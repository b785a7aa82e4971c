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
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if gib <= config.resident_limit_gib:
        name, size, why_not = "resident", f"the decoded images take about {gib:.2f} GiB", ""
    else:
        size = f"the decoded images would take about {gib:.0f} GiB"
        missing = "; not dali, which is not installed: pip install 'leoclr-fast[dali]'"
        if not on_gpu and _is_beton(split) and _is_installed("ffcv"):
            name, why_not = "ffcv", "; not dali or torchvision, which are slower on a .beton"
        elif _is_installed("nvidia.dali"):
            name, why_not = "dali", f"; not torchvision, which {'decodes on the CPU' if on_gpu else 'is slower'}"
        else:
            name, why_not = "nvjpeg" if on_gpu else "torchvision", missing
    log.info("loader %s: %s (resident up to %g GiB)%s", name, size, config.resident_limit_gib, why_not)
    return name


def settle_loader(split: Split, config: LoaderConfig, device: torch.device | None = None) -> LoaderConfig:
    """``config`` with ``auto`` replaced by the loader it stands for, so that the choice is made and told once."""
    return replace(config, name=choose_loader(split, config, device)) if config.name == "auto" else config


def _is_beton(split: Split) -> bool:
    base, _ = base_of(split)
    return isinstance(base, ConvertedSplit) and base.files[0].path.suffix == ".beton"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False
