"""What a figure of a GPU depends on besides the GPU: driver, clocks, power limit, MIG, and who else is using it."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

_GIB = 2**30
_OWN_CONTEXT_GIB = 1.5
_BUSY_PERCENT = 10
_FIELDS = {
    "driver": "driver_version",
    "mig_mode": "mig.mode.current",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
}


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """The state of a GPU as plain JSON, `warnings` last; None for a CPU. Call it before the first measurement.

    memory_used_elsewhere_gib: what neither PyTorch nor a context of our own can explain. What nvidia-smi does not
    say is None.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    used_gib = (total - free - torch.cuda.memory_reserved(device)) / _GIB
    elsewhere_gib = max(0.0, used_gib - _OWN_CONTEXT_GIB)
    state = {
        "name": properties.name,
        "memory_gib": round(total / _GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "mig": "MIG" in properties.name.split(),
        "memory_used_elsewhere_gib": round(elsewhere_gib, 2),
        **_ask_nvidia_smi(str(getattr(properties, "uuid", ""))),
    }
    return {**state, "warnings": sharing_warnings(state)}


def sharing_warnings(state: dict[str, Any]) -> list[str]:
    """What makes the figures of this GPU worth less: a MIG slice, memory or time that others take."""
    warnings = []
    if state["mig"]:
        warnings.append(f"{state['name']} is a MIG slice: its figures are not those of the whole GPU")
    if state["memory_used_elsewhere_gib"] > 0:
        warnings.append(
            f"other programs hold {state['memory_used_elsewhere_gib']:.1f} GiB of this GPU: it is shared, and the "
            "figures with it"
        )
    busy = state["utilization_percent"] or ""  # nvidia-smi has words in place of a number, too
    if busy.isdigit() and int(busy) > _BUSY_PERCENT:
        warnings.append(f"the GPU was {busy} % busy before the first measurement: somebody else is using it")
    return warnings


def _ask_nvidia_smi(uuid: str) -> dict[str, str | None]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"]
    nothing: dict[str, str | None] = dict.fromkeys(_FIELDS)
    try:
        done = subprocess.run(
            [*command, f"--id=GPU-{uuid}"] if uuid else command,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return nothing
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if done.returncode == 0 and len(lines) == 1 else []
    if len(values) != len(_FIELDS):
        return nothing
    return {name: None if "N/A" in value else value for name, value in zip(_FIELDS, values, strict=True)}
