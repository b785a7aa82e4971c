"""The steps of a training: continued where they were, saved when it is due, paused, and stopped on all ranks alike."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset_tools.stop_signals import HANDLED, StoppedBySignalError
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.run import stepper
from leoclr_fast.run.checkpoint import list_checkpoints, step_of
from leoclr_fast.run.stepper import PausedError, Stepper, endless


def steps_of(folder: Path, **options: Any) -> Stepper:
    settings = {"total_steps": 7, "ranks": Ranks(), "save_every_steps": 3, **options}
    return Stepper(folder, **settings)


def trained(own: Stepper, at: Callable[[int], None] = lambda step: None) -> list[int]:
    """The batches that a training of sums sees; `at` is called in each step."""
    total, seen = torch.zeros(()), []
    saved = own.load()
    if saved is not None:
        total.copy_(saved["total"])
        seen.extend(saved["seen"])
    for batch in own.steps(lambda step: range(10 * step, 1000, 10), lambda: {"total": total.clone(), "seen": seen}):
        assert batch == 10 * own.step
        seen.append(batch)
        total.add_(batch)
        at(own.step)
    assert total == sum(seen)
    return seen


def saved_steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def test_checkpoints_lie_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    own = steps_of(tmp_path / "training", keep=9)
    assert trained(own) == [0, 10, 20, 30, 40, 50, 60]
    assert saved_steps(own.folder) == [3, 6, 7]
    assert trained(steps_of(own.folder)) == [0, 10, 20, 30, 40, 50, 60]  # finished: no step is taken again


def test_a_paused_training_continues(tmp_path: Path) -> None:
    """4 steps belong to other trainings: it pauses after 5 of its own, which are 9 in all."""
    with pytest.raises(PausedError, match="paused after step 9") as paused:
        trained(steps_of(tmp_path, pause_after=9, steps_before=4))
    assert (paused.value.step, paused.value.folder) == (9, tmp_path)
    assert saved_steps(tmp_path) == [3, 5]
    with pytest.raises(PausedError, match="paused after step 9"):
        trained(steps_of(tmp_path, pause_after=2, steps_before=4))
    assert trained(steps_of(tmp_path)) == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    def terminated(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(
        StoppedBySignalError, match=f"stopped by {number.name} after step 2 of 7; a checkpoint was saved"
    ):
        trained(steps_of(tmp_path), terminated)
    assert saved_steps(tmp_path) == [2]
    assert signal.getsignal(number) == before
    assert trained(steps_of(tmp_path)) == [0, 10, 20, 30, 40, 50, 60]


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trained(steps_of(tmp_path), lambda step: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class SecondOfTwo(Ranks):
    """Rank 1 of two; rank 0 is not there."""

    def require_equal(self, value: int, what: str) -> None:
        pass


@pytest.fixture
def asked_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Rank 0 is asked to stop before it has finished its step of this number; it is heard of one step later."""

    class Reports:
        def __init__(self, *_: object) -> None:
            self.calls, self.sent = 0, False

        def exchange(self, *, stop: bool) -> tuple[bool, int]:
            before, self.calls = self.sent, self.calls + 1
            self.sent = stop or self.calls >= number
            return before, 0

        def settle(self) -> tuple[bool, int]:
            return self.sent, 0

    def ask(step: int) -> None:
        nonlocal number
        number = step

    number = 0
    monkeypatch.setattr(stepper, "StepReports", Reports)
    monkeypatch.setattr(stepper, "HostGroup", lambda *_: nullcontext())
    return ask


def test_all_ranks_stop_when_one_is_asked(tmp_path: Path, asked_at: Callable[[int], None]) -> None:
    """At the same step, the next one, and without writing twice what the first rank writes."""
    asked_at(4)
    own = steps_of(tmp_path, ranks=SecondOfTwo(1, 2))
    with pytest.raises(StoppedBySignalError, match="a signal to another rank after step 5 of 7"):
        trained(own)
    assert saved_steps(tmp_path) == []


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    def terminated(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignalError, match="stopped by SIGTERM after step 7 of 7"):
        trained(steps_of(tmp_path), terminated)
    assert saved_steps(tmp_path)[-1] == 7
    assert trained(steps_of(tmp_path)) == [0, 10, 20, 30, 40, 50, 60]


def test_nor_is_that_of_another_rank(tmp_path: Path, asked_at: Callable[[int], None]) -> None:
    """Whose answer is still on its way after the last step."""
    asked_at(2)
    with pytest.raises(StoppedBySignalError, match="a signal to another rank after step 2 of 2"):
        trained(steps_of(tmp_path, total_steps=2, ranks=SecondOfTwo(1, 2)))


def test_endless_epochs_begin_in_the_middle() -> None:
    def epoch(number: int, start: int) -> list[tuple[int, int]]:
        return [(number, step) for step in range(start, 3)]

    batches = endless(epoch, 3, 4)
    assert [next(batches) for _ in range(4)] == [(1, 1), (1, 2), (2, 0), (2, 1)]
