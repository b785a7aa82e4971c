"""What the ranks report of their steps: slow ones are named once."""

from __future__ import annotations

import logging

import pytest

from leoclr_fast.distributed.step_reports import RankTimes, StepReport


def reports(*own_s: float) -> list[StepReport]:
    longest = max(own_s)
    return [StepReport(stop=False, rows_on_host=0, step_s=longest, data_wait_s=own / 4, own_s=own) for own in own_s]


def test_a_slow_rank_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    times = RankTimes()
    for own_s in (0.1, 0.4, 0.4):
        for _ in range(10):
            times.add(reports(0.1, 0.1, own_s))
        with caplog.at_level(logging.WARNING):
            means = times.take()
        assert means == {
            "rank_step_s": [own_s] * 3,
            "rank_data_wait_s": [0.025, 0.025, own_s / 4],
            "rank_own_s": [0.1, 0.1, own_s],
        }
    assert [record.getMessage() for record in caplog.records] == [
        "rank 2 is slow: 0.400 s of its own in a step, the ranks' median is 0.100 s, and all wait for it; data "
        "wait 0.100 s"
    ]


def test_the_noise_of_a_step_is_none(caplog: pytest.LogCaptureFixture) -> None:
    times = RankTimes()
    for own_s in (0.1, 0.5, *[0.1] * 18):
        times.add(reports(0.1, own_s))
    times.take()
    assert not caplog.records
