"""What the control groups of Linux (containers, SLURM, Kubernetes) leave to this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process may use; None without a limit."""
    quotas = []
    for folder in _folders(root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max" and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_left_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """The tightest limit, and what is left of it without the page cache, bytes; None without a limit."""
    tightest: tuple[int, int] | None = None
    for folder in _folders(root):
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            if limit == "max":
                continue
            left = int(limit) - max(0, int(used) - _counter(folder / "memory.stat", "inactive_file"))
        except (OSError, ValueError):
            continue
        if tightest is None or left < tightest[1]:
            tightest = int(limit), left
    return tightest


def _counter(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _folders(root: Path) -> Iterator[Path]:
    """This process's group and all groups around it, of version 2: each may set a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        if line.startswith("0::"):
            group = top / line.removeprefix("0::").strip("/")
            around = [group, *group.parents]
            yield from around[: around.index(top) + 1]
