"""The CPU cores that this process may keep busy."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores of this process's affinity mask, shared fairly with the other ranks of the machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
