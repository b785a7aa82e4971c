"""What is measured while a run trains: metrics of the steps, where the time goes, what the device gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leoclr_fast.config import ResultConfig, RunConfig
from leoclr_fast.distributed.host_group import HostGroup
from leoclr_fast.distributed.step_reports import StepReports
from leoclr_fast.machine.energy import EnergyMeter, energy_between
from leoclr_fast.method.flops import mfu, peak_flops_per_s, training_flops_per_image
from leoclr_fast.run.telemetry import StepMetrics, TrainingClock
from leoclr_fast.training.state import TrainingState


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
        self._batch_size = config.result.batch_size
        self._metrics = StepMetrics(ranks, state.step, metric_names, loss_is_scaled=state.scaler.is_enabled())
        self._device_meter = DeviceMeter(config.result, config.speed.precision, ranks.world_size, device)
        self._reports = StepReports(host)
        self.clock = TrainingClock(state.step)
        self._num_arrived = 0

    def add(self, metrics: Tensor, *, stop: bool) -> bool:
        """What a step returned. stop: whether this rank was asked to end. Returns whether all ranks stop after it."""
        self._metrics.add(metrics)
        stops, self._num_arrived = self._reports.exchange(stop=stop, num_arrived=self._metrics.num_arrived)
        return stops

    def stop(self) -> bool:
        """The last step is done. Returns whether a rank was asked to end in it."""
        self.clock.stop()
        return self._reports.settle()[0]

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
        )

    def arrived(self, *, wait: bool) -> Iterator[dict[str, Any]]:
        """The means of each `send` that has arrived on all ranks; wait: of all. Raises NonFiniteLossError."""
        return self._metrics.arrived(self._num_arrived, wait=wait)


class DeviceMeter:
    """Readings now and then; what is not known is left out."""

    def __init__(self, config: ResultConfig, precision: str, num_gpus: int, device: torch.device) -> None:
        self._device = device
        self._num_gpus = num_gpus
        self._flops_per_image = training_flops_per_image(config)
        self._peak, _ = peak_flops_per_s(device, precision)
        self._energy = EnergyMeter.of(device)
        self._last_j, self._last_s = self._energy.read_j(), time.perf_counter()

    def readings(self, images_per_s: float) -> dict[str, float]:
        """images_per_s: over all ranks, since the last call.

        Returns those that are known of mfu (0 to 1), gpu_memory_gib (peak of the tensors since the start), and since
        the last call gpu_energy_j and gpu_power_w; memory and energy are this rank's GPU's.
        """
        now_j, now_s = self._energy.read_j(), time.perf_counter()
        energy_j = energy_between(self._last_j, now_j)
        known = {
            "mfu": mfu(self._flops_per_image, images_per_s / self._num_gpus, self._peak),
            "gpu_memory_gib": None,
            "gpu_energy_j": energy_j,
            "gpu_power_w": None if energy_j is None else energy_j / (now_s - self._last_s),
        }
        if self._device.type == "cuda":
            known["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._last_j, self._last_s = now_j, now_s
        return {name: value for name, value in known.items() if value is not None}
