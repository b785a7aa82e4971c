"""Tiny runs without their page, which would take two thirds of their time: whole only where a test looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from leoclr_fast.training.run_log import RunLog

_WRITE = RunLog._write_report


def leave_out() -> None:
    """For a process of its own: its runs write no report."""
    RunLog._write_report = lambda self: None  # type: ignore[method-assign]


@contextmanager
def runs_write_pages(written: bool) -> Iterator[None]:
    """Whether runs in this process write their report within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "_write_report", _WRITE if written else lambda self: None)
        yield
