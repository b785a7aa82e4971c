"""A signal is a wish, or an order where there is nothing to lose."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError, stop_signals


def test_a_signal_is_a_wish() -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.name) == (True, "SIGTERM")
        with pytest.raises(StoppedBySignalError, match=r"^stopped by SIGTERM; give the same command again$"):
            stop.raise_if_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def _stop_and_sleep() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)


@pytest.mark.parametrize("patience_s", [0.0, 0.1])
def test_what_can_be_cut_short_is(patience_s: float) -> None:
    """At once, or after the patience, also in the middle of a system call."""
    with stop_signals(repeats_insist=False) as stop:
        stop.patience_s = patience_s
        start = time.monotonic()
        with pytest.raises(StoppedAtOnce, match="stopped by SIGTERM; what was saved before is kept"):
            _stop_and_sleep()
        assert patience_s <= time.monotonic() - start < 10


def test_patience_ends_with_what_can_be_cut_short() -> None:
    """A step is done in time: from there on the loop grants the wish."""
    with stop_signals(repeats_insist=False) as stop:
        stop.patience_s = 0.05
        os.kill(os.getpid(), signal.SIGTERM)
        stop.patience_s = None
        time.sleep(0.2)
        assert stop.requested
    with stop_signals() as stop:
        stop.patience_s, stop.saving = 0.0, True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
