"""The methods by name."""

from __future__ import annotations

import torch

from dataset_tools.limits import unknown
from leoclr_fast.config import ResultConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.leoclr import LeOCLR
from leoclr_fast.method.method import Method
from leoclr_fast.method.mocov2 import MoCoV2

METHODS: dict[str, type[Method]] = {"leoclr": LeOCLR, "mocov2": MoCoV2}


def method_class(name: str) -> type[Method]:
    """The class of `--method.name`. Raises ValueError for an unknown one; the nearest names are offered."""
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]


def build_method(result: ResultConfig, ranks: Ranks | None = None) -> Method:
    """The configured method with weights and queue drawn from the seed, on the CPU; the same on every rank.

    Raises ValueError for a method that is unknown or cannot run with this configuration.
    """
    kind = method_class(result.method.name)
    kind.require(result)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(result.seed)
        return kind(result, ranks or Ranks())
