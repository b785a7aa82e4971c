"""Lines of long work, away from a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dataset_tools import progress as module
from dataset_tools.progress import progress, waiting


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_S", 0.02)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.02)


def until(says: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not says():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_how_far_work_is(package_log: pytest.LogCaptureFixture) -> None:
    with progress("decoding", 300) as advance:
        advance(10)
        assert not package_log.messages
        time.sleep(0.03)
        advance(140)
    (line,) = package_log.messages
    assert line.startswith("decoding: 150 of 300 images, ")
    assert line.endswith(" a second, 0:00:00 left")


def test_how_long_it_is_waited_for(package_log: pytest.LogCaptureFixture) -> None:
    with waiting("reading what is in data") as is_over:
        until(lambda: len(package_log.messages) >= 2)
        is_over()
        time.sleep(0.05)  # for a line that is being said
        said = len(package_log.messages)
        time.sleep(0.1)
    assert len(package_log.messages) == said
    assert set(package_log.messages) == {"reading what is in data: 0:00:00 so far"}
