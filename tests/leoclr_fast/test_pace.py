"""Evaluations of several ranks: one that hangs at a batch ends all of them, and one that is only slow does not."""

from __future__ import annotations

import math
import time

import pytest

from leoclr_fast.evaluate import evaluation_ranks, pace
from leoclr_fast.evaluate.pace import Pace
from leoclr_fast.ranks.process_group import _COLLECTIVE_TIMEOUT
from leoclr_fast.ranks.watchdog import Watchdog
from tests.leoclr_fast.test_watchdog import LIMIT_S, killed, limits, port, two_ranks

__all__ = ["killed", "port"]


def takes_batches(own: Watchdog) -> None:
    for _ in Pace(own).batches("the features of val", range(600)):
        time.sleep(0.05)


def hangs_at_the_fourth(own: Watchdog) -> None:
    for batch in Pace(own).batches("the features of val", range(9)):
        time.sleep(LIMIT_S if batch == 3 else 0.05)


def test_a_rank_that_hangs_at_a_batch_is_named(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The limits of the watchdog itself are far off."""
    monkeypatch.setattr(pace, "BATCH_LIMIT_S", 1.0)
    with two_ranks(port, limits(step_s=math.inf), takes_batches, hangs_at_the_fourth) as ranks:
        for rank in ranks:
            assert rank.ended.wait(LIMIT_S)
            assert "last step 3, in the features of val" in rank.sentence
            assert rank.sentence.startswith("rank 1 on ")


def test_the_first_batches_and_slow_ones_may_take_their_time(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """0.8 s for each of the first two, 1.5 s later: more than the limit, and less than ten times the second."""

    def slow(own: Watchdog) -> None:
        for batch in Pace(own).batches("the features of val", range(600)):
            time.sleep({0: 0.8, 1: 0.8, 2: 0.8, 4: 1.5}.get(batch, 0.01))

    monkeypatch.setattr(pace, "BATCH_LIMIT_S", 0.3)
    with two_ranks(port, limits(), takes_batches, slow) as ranks:
        assert not ranks[0].ended.wait(5.0)
    monkeypatch.setattr(pace, "START_LIMIT_S", 0.3)
    with two_ranks(port, limits(), takes_batches, slow) as ranks:
        assert ranks[0].ended.wait(LIMIT_S)


def test_limits_are_shorter_than_a_collective_is_waited_for() -> None:
    assert pace.BATCH_LIMIT_S < pace.START_LIMIT_S < _COLLECTIVE_TIMEOUT.total_seconds()
    assert math.isfinite(evaluation_ranks._LIMITS.phase_s)


def test_every_batch_comes_once_and_the_end_is_an_end() -> None:
    assert list(Pace(Watchdog(None, limits())).batches("anything", iter("abc"))) == ["a", "b", "c"]
    assert list(Pace().batches("anything", "abc")) == ["a", "b", "c"]
    assert list(Pace(Watchdog(None, limits())).batches("anything", [])) == []
