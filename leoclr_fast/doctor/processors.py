"""What this process may use: cores, memory, the part of it that processes share, and limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed

_GIB = 2**30
_FEW_CORES = 2
_FEW_FILES, _TOO_FEW_FILES = 4096, 256
_LITTLE_MEMORY_GIB, _TOO_LITTLE_MEMORY_GIB = 8.0, 1.0
_LITTLE_SHARED_GIB, _TOO_LITTLE_SHARED_GIB = 2.0, 0.25
_MORE_SHARED = (
    "Give more: `docker run --shm-size 16g`, a volume `emptyDir: {medium: Memory}` at /dev/shm in Kubernetes, or "
    "`mount -o remount,size=16G /dev/shm`."
)


def cores(root: Path = Path("/")) -> Result:
    """What this process may really use: its affinity and its quota, not what the machine has."""
    allowed, installed, quota = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota(root)
    load = os.getloadavg()[0]
    limit = f", a quota of {quota:g} cores' time" if quota is not None else ""
    result = Result(f"{allowed} of {installed} cores{limit}, load {load:.1f}")
    if quota is not None and quota < allowed:
        remedy = f"Give `--loader.workers {max(1, int(quota))}`, or ask for more cores."
        result.warn("the quota is less than the cores, so one worker a core is throttled", remedy)
    if min(allowed, quota or allowed) < _FEW_CORES:
        remedy = "Ask for more (SLURM: `--cpus-per-task 16`; Docker: `--cpus 16`)."
        result.warn("one core cannot load images beside training", remedy)
    if load > installed:
        remedy = "Look who with `top`: figures measured now are worth little."
        result.warn(f"{load:.1f} programs want to run at a time", remedy)
    return result


def memory(root: Path = Path("/")) -> Result:
    """What is there and what is left, for this machine and for this control group."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in (root / "proc/meminfo").read_text().splitlines()}
    total_gib, left_gib = kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20
    result = Result(f"{left_gib:.1f} of {total_gib:.1f} GiB available")
    if (group := memory_left_bytes(root)) is not None:
        limit_gib, group_left_gib = (number / _GIB for number in group)
        result.found += f"; this control group: {group_left_gib:.1f} of {limit_gib:.1f} GiB left"
        left_gib = min(left_gib, group_left_gib)
    if left_gib < _LITTLE_MEMORY_GIB:
        add = result.fail if left_gib < _TOO_LITTLE_MEMORY_GIB else result.warn
        add(
            f"{left_gib:.1f} GiB are little",
            "End other programs, ask for more (SLURM: `--mem`), or train with fewer `--loader.workers`.",
        )
    return result


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups (containers, SLURM, Kubernetes) leave to this process; None without
    a limit.
    """
    limits = [text.split() for (text,) in _of_groups(root, "cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=None)


def memory_left_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """The tightest limit of the control groups, and what is left of it without the page cache, bytes; None without a
    limit.
    """
    found = []
    for limit, used, counters in _of_groups(root, "memory.max", "memory.current", "memory.stat"):
        if limit.strip() != "max":
            cached = dict(line.split() for line in counters.splitlines()).get("inactive_file", "0")
            found.append((int(limit), int(limit) - max(0, int(used) - int(cached))))
    return min(found, key=lambda limit_and_left: limit_and_left[1], default=None)


def _of_groups(root: Path, *names: str) -> Iterator[list[str]]:
    """The content of these files of this process's control group and all groups around it, of version 2: each may set
    a limit. Groups that lack one are passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        if line.startswith("0::"):
            group = top / line.removeprefix("0::").strip("/")
            around = [group, *group.parents]
            for folder in around[: around.index(top) + 1]:
                if all((folder / name).exists() for name in names):
                    yield [(folder / name).read_text() for name in names]


def shared_memory(folder: str = "/dev/shm") -> Result:
    """DataLoader's worker processes hand their batches over through it; where it is full they die of SIGBUS."""
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return failed(f"{folder} is missing ({error.strerror})", f"Mount it: `mount -t tmpfs shm {folder}`.")
    if not os.access(folder, os.W_OK | os.X_OK):
        return failed(f"{folder} cannot be written", f"Allow it: `chmod 1777 {folder}`.")
    size_gib, free_gib = room.f_blocks * room.f_frsize / _GIB, room.f_bavail * room.f_frsize / _GIB
    result = Result(f"{folder}: {free_gib:.2f} of {size_gib:.2f} GiB free")
    if free_gib < _LITTLE_SHARED_GIB:
        add = result.fail if free_gib < _TOO_LITTLE_SHARED_GIB else result.warn
        add("a batch of 256 images takes 0.11 GiB, and --loader torchvision keeps several in it", _MORE_SHARED)
    return result


def limits(getrlimit: Callable[[int], tuple[int, int]] = resource.getrlimit, root: Path = Path("/")) -> Result:
    """Open files and locked memory, as `ulimit` sets them.

    getrlimit, root: where they and `/sys` are read, others in tests.
    """
    files, locked = (getrlimit(number)[0] for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    result = Result(f"open files {_limit(files)}, locked memory {_limit(locked, ' B')}")
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        add = result.fail if files < _TOO_FEW_FILES else result.warn
        add(f"{files} open files are few for loaders with many workers", "Allow more with `ulimit -n 65536`.")
    if (root / "sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        remedy = "Allow it with `ulimit -l unlimited` (containers: `--ulimit memlock=-1`)."
        result.warn("InfiniBand needs locked memory without a limit", remedy)
    return result


def _limit(limit: int, unit: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}{unit}"
