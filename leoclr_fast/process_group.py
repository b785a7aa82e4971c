"""The process group that torchrun announces, and the device of this process in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from leoclr_fast.distributed import Ranks

_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group that torchrun announced in the environment, if any, and leave it at the end.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. Yields this process's `Ranks` and its device.
    Raises ValueError for a device that this machine does not have.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = resolve_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield Ranks(dist.get_rank(), dist.get_world_size()), chosen
    # Not after an exception: closing may wait for ranks that wait for this one, and the error must be told first.
    dist.destroy_process_group()


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device that a `--device` means for the rank `local_rank` of this machine."""
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}; choose auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return chosen
    if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {device} would put all ranks of this machine on one GPU; give --device cuda")
    index = local_rank if chosen.index is None else chosen.index
    if index >= num_gpus:
        raise ValueError(f"--device {device} means GPU {index}, but this machine has {num_gpus}; choose --device cpu")
    return torch.device("cuda", index)
