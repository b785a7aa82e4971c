"""The operating system, and whether this is a container."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, failed, ok

_CONTAINER_MARKS = (".dockerenv", "run/.containerenv", ".singularity.d", "run/.singularity.d")


def system(root: Path = Path("/")) -> Finding:
    """Name, kernel, container, user. root: where `/proc` and the like are found, another one in tests."""
    if platform.system() != "Linux":
        return failed(platform.platform(), "Run it under Linux: in a container, a virtual machine or WSL 2.")
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    inside = f"in a container ({container})" if (container := _container(root)) else "not in a container that shows"
    return ok(f"{_name(root)}, kernel {platform.release()}, {platform.machine()}, {inside}, as {user}")


def _name(root: Path) -> str:
    try:
        lines = (root / "etc/os-release").read_text().splitlines()
    except OSError:
        return "Linux"
    return next((line.split("=", 1)[1].strip('"') for line in lines if line.startswith("PRETTY_NAME=")), "Linux")


def _container(root: Path) -> str | None:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "Kubernetes"
    return next((f"/{mark} exists" for mark in _CONTAINER_MARKS if (root / mark).exists()), None)
