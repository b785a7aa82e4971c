"""Memory, and the part of it that processes share."""

from __future__ import annotations

import os
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, Trouble, failed, judged, not_applicable
from leoclr_fast.machine.control_groups import memory_left_bytes

_GIB = 2**30
_LITTLE_MEMORY_GIB, _TOO_LITTLE_MEMORY_GIB = 8.0, 1.0
_LITTLE_SHARED_GIB, _TOO_LITTLE_SHARED_GIB = 2.0, 0.25
_MORE_SHARED = (
    "Give more: `docker run --shm-size 16g`, a volume `emptyDir: {medium: Memory}` at /dev/shm in Kubernetes, or "
    "`mount -o remount,size=16G /dev/shm`."
)


def memory(root: Path = Path("/")) -> Finding:
    """What is there and what is left, for this machine and for this control group."""
    try:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in (root / "proc/meminfo").read_text().splitlines()}
    except (OSError, ValueError, IndexError) as error:
        return not_applicable(f"/proc/meminfo cannot be read: {error}")
    total_gib, left_gib = kib["MemTotal"] / 2**20, kib.get("MemAvailable", kib.get("MemFree", 0)) / 2**20
    found = f"{left_gib:.1f} of {total_gib:.1f} GiB available"
    group = memory_left_bytes(root)
    if group is not None:
        limit_gib, group_left_gib = (number / _GIB for number in group)
        found += f"; this control group: {group_left_gib:.1f} of {limit_gib:.1f} GiB left"
        left_gib = min(left_gib, group_left_gib)
    troubles = []
    if left_gib < _LITTLE_MEMORY_GIB:
        status = "failed" if left_gib < _TOO_LITTLE_MEMORY_GIB else "warning"
        troubles.append(
            Trouble(
                status,  # type: ignore[arg-type]
                f"{left_gib:.1f} GiB are little",
                "End other programs, ask for more (SLURM: `--mem`), or train with fewer `--loader.workers`.",
            )
        )
    return judged(found, troubles)


def shared_memory(folder: str = "/dev/shm") -> Finding:
    """DataLoader's worker processes hand their batches over through it; where it is full they die of SIGBUS."""
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return failed(f"{folder} is missing ({error.strerror})", f"Mount it: `mount -t tmpfs shm {folder}`.")
    if not os.access(folder, os.W_OK | os.X_OK):
        return failed(f"{folder} cannot be written", f"Allow it: `chmod 1777 {folder}`.")
    size_gib, free_gib = room.f_blocks * room.f_frsize / _GIB, room.f_bavail * room.f_frsize / _GIB
    troubles = []
    if free_gib < _LITTLE_SHARED_GIB:
        status = "failed" if free_gib < _TOO_LITTLE_SHARED_GIB else "warning"
        what = "a batch of 256 images takes 0.11 GiB, and --loader torchvision keeps several in it"
        troubles.append(Trouble(status, what, _MORE_SHARED))  # type: ignore[arg-type]
    return judged(f"{folder}: {free_gib:.2f} of {size_gib:.2f} GiB free", troubles)
