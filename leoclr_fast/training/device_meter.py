"""What training gets out of its device, and what it takes: MFU, memory, energy."""

from __future__ import annotations

import time

import torch

from leoclr_fast.config import ResultConfig
from leoclr_fast.machine.energy import EnergyMeter, energy_between
from leoclr_fast.method.flops import mfu, peak_flops_per_s, training_flops_per_image


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
