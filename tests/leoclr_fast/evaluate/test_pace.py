"""Evaluations of several ranks: one that hangs at a batch ends all of them, and one that is only slow does not."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from leoclr_fast.distributed.process_group import _COLLECTIVE_TIMEOUT
from leoclr_fast.distributed.watchdog import Watchdog
from leoclr_fast.evaluate import evaluation_ranks, pace
from leoclr_fast.evaluate.pace import Pace
from tests.leoclr_fast.distributed.test_watchdog import LIMIT_S, killed, limits, port, stands_by, two_ranks

__all__ = ["killed", "port"]


class Noted(Watchdog):
    """Notes the limits of its phases, and the steps."""

    def __init__(self) -> None:
        super().__init__(None, limits())
        self.limits_s: list[float | None] = []
        self.steps: list[int] = []

    @contextmanager
    def phase(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        self.limits_s.append(limit_s)
        yield

    def progress(self, step: int) -> None:
        self.steps.append(step)


def test_a_rank_that_hangs_at_a_batch_is_named(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The limits of the watchdog itself are far off."""

    def hangs_at_the_fourth(own: Watchdog, over: threading.Event) -> None:
        for batch in Pace(own).batches("the features of val", range(9)):
            if batch == 3:
                over.wait()

    monkeypatch.setattr(pace, "BATCH_LIMIT_S", 1.0)
    far_off = limits(step_s=math.inf, phase_s=math.inf)
    with two_ranks(port, far_off, stands_by, hangs_at_the_fourth) as ranks:
        for rank in ranks:
            assert rank.ended.wait(LIMIT_S)
            assert "last step 3, in the features of val" in rank.sentence
            assert rank.sentence.startswith("rank 1 on ")


def test_the_first_batches_and_slow_ones_may_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches to start with; then ten times the longest but the first, if that is more than the limit."""
    clock = iter((0.0, 900.0, 905.0, 905.0, 945.0, 945.0, 946.0, 946.0))
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    watchdog = Noted()
    assert list(Pace(watchdog).batches("a test", "abcd", done=10)) == list("abcd")
    start_s, least_s = pace.START_LIMIT_S, pace.BATCH_LIMIT_S
    assert watchdog.limits_s == [start_s, start_s, least_s, 400, 400]
    assert watchdog.steps == [11, 12, 13, 14]


def test_limits_are_shorter_than_a_collective_is_waited_for() -> None:
    assert pace.BATCH_LIMIT_S < pace.START_LIMIT_S < _COLLECTIVE_TIMEOUT.total_seconds()
    assert math.isfinite(evaluation_ranks._LIMITS.phase_s)


def test_every_batch_comes_once_and_the_end_is_an_end() -> None:
    for own in (Pace(Watchdog(None, limits())), Pace()):
        assert list(own.batches("anything", iter("abc"))) == ["a", "b", "c"]
        assert list(own.batches("anything", [])) == []
