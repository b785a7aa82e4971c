"""Where and at what setting a benchmark ran: one line for its head, and whether that is the paper's setting."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

import leoclr_fast
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.config import ResultConfig, SpeedConfig
from leoclr_fast.distributed.process_group import resolve_device


def is_paper_setting(result: ResultConfig) -> bool:
    """Whether network, views and method are those of the paper's setting on one GPU: ResNet-50, 224 pixels, K = 65,536,
    separate key passes, batch-norm of queries and keys in groups of 32.
    """
    paper = BenchSetting().result(result.method.name)
    return (result.backbone, result.views, result.method) == (paper.backbone, paper.views, paper.method)


def setting_header(result: ResultConfig, speed: SpeedConfig, device: torch.device) -> str:
    """One line that says what was run; it stands above every output."""
    backbone, method = result.backbone, result.method
    key, query = (
        f"{kind} in groups of {group}" if kind in ("shuffle", "split") else kind
        for kind, group in (
            (method.key_batchnorm, method.key_batchnorm_group),
            (method.query_batchnorm, method.query_batchnorm_group),
        )
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{backbone.arch}, {backbone.stem} stem, width {backbone.width_multiplier:g}, {result.views.image_size} px, "
        f"batch {result.batch_size}, K = {method.queue_size:,}, key passes {method.key_passes}, key batch-norm {key}, "
        f"query batch-norm {query}, augmentation included, {speed.precision}, torch {torch.__version__}, {where} "
        f"[{'' if is_paper_setting(result) else 'not '}the paper's setting]"
    )


def bench_device(name: str) -> torch.device:
    """The device of a benchmark of one device, made the current one, so that events are recorded there.

    Raises ValueError for a device that this machine does not have, and under torchrun with several ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"this benchmark measures one device, but torchrun started {world_size} processes; start it without "
            "torchrun"
        )
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def baselines(module: str) -> Any:
    """A module of `benchmarks.baselines`, what others wrote, found at run time: it lies above this package in the order
    of imports. Raises ValueError where this package was not started from a checkout of the repository.
    """
    checkout = Path(leoclr_fast.__file__).parent.parent
    if not (checkout / "benchmarks" / "baselines").is_dir():
        raise ValueError(
            "what ours is compared with lies in the folder benchmarks/baselines, which is not part of the installed "
            "package; clone the repository and run it from there"
        )
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    return importlib.import_module(f"benchmarks.baselines.{module}")
