"""The steps of a training: from where its checkpoint left to its end, a pause or a signal.

    stepper = Stepper(folder, total_steps=…, ranks=ranks, save_every_steps=…)
    saved = stepper.load()
    …  # take up what it holds
    for batch in stepper.steps(batches_from, state):
        …  # one training step, the same number on every rank

Legend: a step is finished when the body of that loop is; `Stepper.step` counts the finished ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from dataset_tools.stop_signals import StoppedBySignalError, stop_signals
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.host_group import HostGroup
from leoclr_fast.distributed.process_group import EVALUATION_TIMEOUT_S
from leoclr_fast.distributed.step_reports import StepReports
from leoclr_fast.run.checkpoint import newest_checkpoint, save_checkpoint, step_of
from leoclr_fast.run.telemetry import ProgressDisplay, TrainingClock

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
State = dict[str, Any]


class PausedError(RuntimeError):
    """A training has come to the step that it was to pause after, on all ranks; everything is saved."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"paused after step {step}; the checkpoint is in {folder}")
        self.step, self.folder = step, folder


class Stepper:
    """Counts the steps of a training and saves its state: at an interval, at its end, before a pause, on a signal.

    Every rank has one, and all of them do the same at the same step; the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        ranks: Ranks,
        save_every_steps: int,
        save_every_s: float = 0.0,
        pause_after: int | None = None,
        steps_before: int = 0,
        keep: int = 2,
        display: ProgressDisplay | None = None,
    ) -> None:
        """folder: of the checkpoints, of which the newest `keep` stay.

        A checkpoint is due after every multiple of `save_every_steps`, once the last one is `save_every_s` old.
        pause_after: the step after which `steps` raises PausedError; it counts the `steps_before` of other
        trainings, too. display: where `show` shows.
        """
        self.folder, self.total_steps, self.ranks = folder, total_steps, ranks
        self.step = 0
        self.clock = TrainingClock(0)
        """Runs while `steps` does."""
        self._save_every_steps, self._save_every_s = save_every_steps, save_every_s
        own = total_steps if pause_after is None else max(0, pause_after - steps_before)
        self._last_step, self._steps_before = min(total_steps, own), steps_before
        self._keep, self._display = keep, display
        self._saved_at_s = time.monotonic()

    def load(self) -> State | None:
        """The newest whole checkpoint, read by every rank by itself; None at the beginning.

        Raises DamagedCheckpointError if there are checkpoints and none is whole, RuntimeError if the ranks do not
        see the same one.
        """
        newest = newest_checkpoint(self.folder)
        step = -1 if newest is None else step_of(newest[0])
        self.ranks.require_equal(step, f"the step to continue {self.folder} from")
        if newest is None:
            return None
        log.info("resuming from %s", newest[0])
        self.step = step
        return newest[2]

    def steps(self, batches_from: Callable[[int], Iterable[Batch]], state: Callable[[], State]) -> Iterator[Batch]:
        """The batches of the steps to come, one for each step of the loop's body.

        batches_from: the batches that follow so many finished steps. state: what a checkpoint holds; it is called on
        every rank, and may use collectives.
        Raises PausedError, or StoppedBySignalError on a signal of `HANDLED` to any rank, after a checkpoint;
        OSError if that cannot be written.
        """
        self.clock, stopped = TrainingClock(self.step), False
        to_come, alone = max(0, self._last_step - self.step), self.ranks.world_size == 1
        with (
            HostGroup(self.ranks, EVALUATION_TIMEOUT_S) as host,
            stop_signals(repeats_insist=alone) as stop,
        ):
            reports = StepReports(host)
            for batch in self.clock.timed(islice(batches_from(self.step), to_come)):
                yield batch
                self.step += 1
                stopped = reports.exchange(stop=stop.requested)[0] and self.step < self.total_steps
                if stopped or self.step == self._last_step or self._is_due():
                    stop.saving = stopped
                    self.save(state())
                if stopped:
                    break
            # Of the last step the answer is still on its way; its checkpoint is written.
            stopped = reports.settle()[0] or stopped or (alone and stop.requested)
            if stopped:
                raise StoppedBySignalError(
                    f"stopped by {stop.name or 'a signal to another rank'} after step {self.step} of "
                    f"{self.total_steps}; a checkpoint was saved, and the same command continues from there"
                )
        self.clock.stop()
        if self.step < self.total_steps:
            raise PausedError(self._steps_before + self.step, self.folder)

    def save(self, state: State) -> None:
        """Write the state of the step that was finished last. Raises OSError if that cannot be done."""
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.folder, self.step, state, self._keep)
        self._saved_at_s = time.monotonic()

    def show(self, epoch: int, loss: float, lr: float, batch_size: int) -> None:
        """Show a loss and the speed at the end of the loop's body. epoch: of the step that was taken (from 0)."""
        step = self.step + 1
        metrics = {
            "loss": loss,
            "lr": lr,
            "images_per_s_now": self.clock.lap(step) * batch_size,
            "data_wait_fraction": self.clock.data_wait_fraction,
            "seconds_left": (self.total_steps - step) / self.clock.steps_per_s(step),
        }
        if self._display is not None:
            self._display.update(step, epoch + 1, metrics)

    def _is_due(self) -> bool:
        """Whether a checkpoint belongs here, as the first rank's clock says."""
        if self.step % self._save_every_steps:
            return False
        if not self._save_every_s:
            return True
        return self.ranks.from_main(time.monotonic() - self._saved_at_s >= self._save_every_s)


def endless(epoch_batches: Callable[[int, int], Iterable[Batch]], steps_per_epoch: int, step: int) -> Iterator[Batch]:
    """The batches of all epochs to come, from the one that follows `step` finished steps.

    epoch_batches: those of an epoch (from 0), from a step of it on, as `Loader.batches`.
    """
    first_epoch, start_step = divmod(step, steps_per_epoch)
    for epoch in count(first_epoch):
        yield from epoch_batches(epoch, start_step if epoch == first_epoch else 0)
