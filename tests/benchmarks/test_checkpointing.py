"""The cost of a checkpoint, out of the times of steps."""

from __future__ import annotations

import pytest

from benchmarks.checkpointing import costs


def test_a_slower_turn_changes_nothing() -> None:
    """A wait of half a step, and two steps that take a half and a quarter longer, of ten steps: 12.5 %."""
    turn = [1.5, 1.25, *[1.0] * 8]
    shares = costs([0.5, 1.0], [turn, [2 * step for step in turn]], beside=2)
    assert shares == pytest.approx([0.125, 0.125], rel=1e-12)


def test_a_slow_step_elsewhere_does_not_count() -> None:
    (share,) = costs([0.0], [[1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0]], beside=2)
    assert share == 0
