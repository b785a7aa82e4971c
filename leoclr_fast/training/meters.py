"""What is measured while a run trains: metrics of the steps, where the time goes, what the device gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.host_group import HostGroup
from leoclr_fast.distributed.step_reports import RankTimes, StepReport, StepReports, StepStopwatch
from leoclr_fast.run.telemetry import StepMetrics, TrainingClock
from leoclr_fast.training.device_meter import DeviceMeter
from leoclr_fast.training.state import TrainingState
from pipelines.batch import CropBatch


class Meters:
    """Of this rank; what concerns all of them is the same on all, after every step."""

    def __init__(
        self,
        config: RunConfig,
        metric_names: Sequence[str],
        state: TrainingState,
        host: HostGroup,
        device: torch.device,
    ) -> None:
        ranks = host.ranks
        self._state = state
        self._batch_size = config.result.batch_size
        self._metrics = StepMetrics(ranks, state.step, metric_names, loss_is_scaled=state.scaler.is_enabled())
        self._device_meter = DeviceMeter(config.result, config.speed.precision, ranks.world_size, device)
        self._reports, self._rank_times = StepReports(host), RankTimes(warns=ranks.is_main)
        self.clock = TrainingClock(state.step)
        meter = ranks.meter
        # Seconds of waiting for others: on a CPU in collectives; on a GPU for the device, which waits in them.
        waits: Callable[[], float] = meter.seconds if meter is not None else lambda: self._metrics.device_wait_s
        self._stopwatch = StepStopwatch(lambda: self.clock.data_wait_s, waits)
        self._num_arrived = 0

    def timed(self, batches: Iterable[CropBatch]) -> Iterator[CropBatch]:
        """The batches; the time they let us wait is data wait, and the steps are between them."""
        self._stopwatch.start()
        for batch in self.clock.timed(batches):
            yield batch
            self._stopwatch.start()

    def add(self, metrics: Tensor, *, stop: bool) -> bool:
        """What a step returned. stop: whether this rank was asked to end. Returns whether all ranks stop after it."""
        self._metrics.add(metrics)
        step_s, data_wait_s, own_s = self._stopwatch.read()
        reports = self._reports.exchange(
            StepReport(
                stop=stop,
                rows_on_host=self._metrics.num_arrived,
                step_s=step_s,
                data_wait_s=data_wait_s,
                own_s=own_s,
            )
        )
        self._rank_times.add(reports)
        self._num_arrived = min((report.rows_on_host for report in reports), default=0)
        return any(report.stop for report in reports)

    def stop(self) -> bool:
        """The last step is done. Returns whether a rank was asked to end in it."""
        self.clock.stop()
        return any(report.stop for report in self._reports.settle())

    @property
    def num_steps(self) -> int:
        """Steps whose metrics were not yet sent to the host."""
        return self._metrics.num_steps

    def send(self, *, step: int, epoch: int, lr: float, last_step: int) -> None:
        """Start the way of the metrics to the host, with how fast it goes, as the host knows it: on a GPU it is a few
        steps ahead."""
        steps_per_s_now = self.clock.lap(step)
        images_per_s_now = steps_per_s_now * self._batch_size
        self._metrics.send(
            step=step,
            epoch=epoch,
            lr=lr,
            images_per_s=self.clock.steps_per_s(step) * self._batch_size,
            images_per_s_now=images_per_s_now,
            data_wait_fraction=self.clock.data_wait_fraction,
            seconds_left=(last_step - step) / steps_per_s_now,
            **self._device_meter.readings(images_per_s_now),
            **self._rank_times.take(),
        )

    def arrived(self, *, wait: bool) -> Iterator[dict[str, Any]]:
        """The means of each `send` that has arrived on all ranks; wait: of all. Raises NonFiniteLossError."""
        return self._metrics.arrived(self._num_arrived, wait=wait)
