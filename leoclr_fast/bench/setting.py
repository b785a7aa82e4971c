"""Where and at what setting a benchmark ran: one line for its head, and how far that is from the paper's setting."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

import leoclr_fast
from leoclr_fast.config import ResultConfig, SpeedConfig
from leoclr_fast.distributed.process_group import resolve_device


def departures_from_paper(result: ResultConfig) -> list[str]:
    """What differs from the paper's setting on one GPU: ResNet-50, 224 pixels, K = 65,536, separate key passes,
    batch-norm of queries and keys in groups of 32, augmentation included. Empty for the paper's setting itself.
    """
    given_and_meant = {
        "arch": (result.backbone.arch, "resnet50"),
        "stem": (result.backbone.stem, "imagenet"),
        "width": (result.backbone.width_multiplier, 1.0),
        "image size": (result.views.image_size, 224),
        "queue": (result.method.queue_size, 65_536),
        "key passes": (result.method.key_passes, "separate"),
        "key batch-norm": (batchnorms(result)[0], "shuffle in groups of 32"),
        "query batch-norm": (batchnorms(result)[1], "split in groups of 32"),
        "blur probability": (result.views.blur_probability, 0.5),
    }
    return [f"{name} {given} (not {meant})" for name, (given, meant) in given_and_meant.items() if given != meant]


def batchnorms(result: ResultConfig) -> tuple[str, str]:
    """Batch-norm of keys and of queries, in words; on one device, split keys are shuffled ones."""
    method = result.method
    key: str = "shuffle" if method.key_batchnorm == "split" else method.key_batchnorm
    key += f" in groups of {method.key_batchnorm_group}" if key == "shuffle" else ""
    query = f"split in groups of {method.query_batchnorm_group}" if method.query_batchnorm == "split" else ""
    return key, query or method.query_batchnorm


def setting_header(result: ResultConfig, speed: SpeedConfig, device: torch.device) -> str:
    """One line that says what was run; it stands above every output."""
    departures = departures_from_paper(result)
    kind = "paper setting" if not departures else f"not the paper setting: {', '.join(departures)}"
    key, query = batchnorms(result)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{result.backbone.arch}, {result.views.image_size} px, batch {result.batch_size}, K = "
        f"{result.method.queue_size:,}, key passes {result.method.key_passes}, key batch-norm {key}, query batch-norm "
        f"{query}, augmentation included, {speed.precision}, torch {torch.__version__}, {where} [{kind}]"
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
