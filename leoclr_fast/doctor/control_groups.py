"""What the control groups of Linux (containers, SLURM, Kubernetes) leave to this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT_BYTES = 2**60  # version 1 says "no limit" by a huge number


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process may use; None without a limit."""
    quotas = []
    for folder in _folders(root, "cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1") and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_left_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """The tightest limit, and what is left of it without the page cache, bytes; None without a limit."""
    tightest: tuple[int, int] | None = None
    for folder in _folders(root, "memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if not (folder / names[0]).exists():
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        try:
            limit, used = ((folder / name).read_text().strip() for name in names[:2])
            if limit == "max" or int(limit) >= _NO_LIMIT_BYTES:
                continue
            left = int(limit) - max(0, int(used) - _counter(folder / "memory.stat", names[2]))
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


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's group and all groups around it: each may set a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        top = root / "sys/fs/cgroup" / (controllers if controllers else "")
        if controllers and not top.is_dir():
            top = root / "sys/fs/cgroup" / controller
        group = top / path.strip("/")
        around = [group, *group.parents]
        yield from around[: around.index(top) + 1]
