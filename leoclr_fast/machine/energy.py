"""Energy of a GPU, by the counter that NVML keeps. Needs the package pynvml (PyPI: nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

_J_PER_KWH = 3.6e6


class EnergyMeter:
    """Joules that the whole GPU of a device has taken, its other users' included.

    Where there is no counter every reading is None, and `missing` says why: an unknown energy is not zero.
    """

    def __init__(self, handle: Any, missing: str | None) -> None:
        self._handle = handle
        self.missing = missing
        """Why there is no reading; None where there is one."""

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """The meter of a device; never raises."""
        if device.type != "cuda":
            return cls(None, f"a {device.type.upper()} has no energy counter that we read")
        name = torch.cuda.get_device_name(device)
        if "MIG" in name.split():
            return cls(None, f"{name} is a MIG slice, and the counter is the whole GPU's")
        try:
            import pynvml
        except ImportError:
            return cls(None, "NVML's Python package is missing: pip install nvidia-ml-py")
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (pynvml.NVMLError, AttributeError) as error:
            return cls(None, f"NVML gives no energy here: {error}")
        return cls(handle, None)

    def read_j(self) -> float | None:
        """Joules since the driver was loaded; the counter moves every few ten milliseconds."""
        if self._handle is None:
            return None
        import pynvml

        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError as error:
            self._handle, self.missing = None, f"NVML stopped giving energy: {error}"
            return None


def energy_between(before_j: float | None, after_j: float | None) -> float | None:
    """Joules between two readings; None if one is missing, or if the counter began anew between them."""
    if before_j is None or after_j is None or after_j < before_j:
        return None
    return after_j - before_j


def energy_kwh(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The sum of `gpu_energy_j` over the step records of a run; None if there are none, or one lacks it."""
    joules = [record.get("gpu_energy_j") for record in records]
    known = [value for value in joules if value is not None]
    return sum(known) / _J_PER_KWH if known and len(known) == len(joules) else None
