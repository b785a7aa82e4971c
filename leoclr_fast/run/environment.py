"""What a result was made with: versions, hardware, threads, git commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import leoclr_fast
from dataset_tools.versions import installed_version

if TYPE_CHECKING:
    import torch

_PACKAGES = ("leoclr-fast", "torch", "torchvision", "numpy", "pillow", "numba", "triton", "nvidia-dali-cuda130", "ffcv")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """As plain JSON; what a machine does not have is left out or None."""
    import torch

    versions = {package: installed_version(package) for package in _PACKAGES}
    return {
        "versions": {package: version for package, version in versions.items() if version is not None},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "world_size": world_size,
        "local_world_size": int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        "git_commit": _git_commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git_commit() -> str | None:
    """The commit of the source tree that runs, with a `+` if it has changes; None outside a checkout."""
    source = Path(leoclr_fast.__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty=+", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def boot_id() -> str | None:
    """Of the running kernel: two processes with the same one see each other's file locks. None where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
