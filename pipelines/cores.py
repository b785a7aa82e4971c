"""The CPU cores that this process may keep busy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_share: int | None = None


def available_cores() -> int:
    """This process's fair share of the cores, at least one.

    It is what `sharing_cores` says; without that, the cores of the affinity mask divided by the ranks of the machine.
    """
    if _share is not None:
        return _share
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def sharing_cores(share: int) -> Iterator[None]:
    """Within it, this process counts on so many cores."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before
