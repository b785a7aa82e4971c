"""What this process may use: cores, memory, the part of it that processes share, and limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

from leoclr_fast.doctor.control_groups import cpu_quota, memory_left_bytes
from leoclr_fast.doctor.result import Result, failed, not_applicable

_GIB = 2**30
_FEW_CORES = 2
_FEW_FILES, _TOO_FEW_FILES, _FEW_PROCESSES = 4096, 256, 4096
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
    try:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in (root / "proc/meminfo").read_text().splitlines()}
    except (OSError, ValueError, IndexError) as error:
        return not_applicable(f"/proc/meminfo cannot be read: {error}")
    total_gib, left_gib = kib["MemTotal"] / 2**20, kib.get("MemAvailable", kib.get("MemFree", 0)) / 2**20
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
    """Open files, processes, locked memory and core files, as `ulimit` sets them.

    getrlimit, root: where they and `/sys` are read, others in tests.
    """
    files, processes, locked, core = (
        getrlimit(number)[0]
        for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK, resource.RLIMIT_CORE)
    )
    result = Result(
        f"open files {_limit(files)}, processes {_limit(processes)}, locked memory {_limit(locked, ' B')}, core files "
        f"{_limit(core, ' B')}"
    )
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        add = result.fail if files < _TOO_FEW_FILES else result.warn
        add(f"{files} open files are few for loaders with many workers", "Allow more with `ulimit -n 65536`.")
    if processes != resource.RLIM_INFINITY and processes < _FEW_PROCESSES:
        what = f"{processes} processes and threads are few for several ranks"
        result.warn(what, "Allow more with `ulimit -u 65536`.")
    if (root / "sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        remedy = "Allow it with `ulimit -l unlimited` (containers: `--ulimit memlock=-1`)."
        result.warn("InfiniBand needs locked memory without a limit", remedy)
    return result


def _limit(limit: int, unit: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}{unit}"
