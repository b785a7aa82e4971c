"""Section `machine`: what everything else was measured on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from benchmarks.results import made_with
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.machine.energy import EnergyMeter
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.run.environment import environment

_OPTIONAL = ("triton", "nvidia.dali", "ffcv", "lightly", "pynvml", "tyro", "yaml", "pytest")


def run(config: SuiteConfig, say: Say) -> Answer:
    """Environment, state of the GPU, which optional packages are there."""
    device = resolve_device(config.device)
    surroundings = environment(device, 1)
    state = gpu_state(device)
    packages = {name: _is_there(name) for name in _OPTIONAL}
    result = {
        "environment": surroundings,
        "gpu": state,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "packages": packages,
        "energy": EnergyMeter.of(device).missing or "read by NVML",
    }
    lines = [
        f"- {made_with(surroundings, 'lightly')} Processor: {surroundings['cpu']}, {surroundings['cpu_cores']} cores; "
        f"CUDA {surroundings['cuda']}, cuDNN {result['cudnn']}",
        f"- energy: {result['energy']}",
        f"- not installed: {', '.join(name for name, there in packages.items() if not there) or 'nothing'}",
    ]
    if state is not None:
        lines.append(
            f"- driver {state['driver']}, MIG {state['mig_mode'] or ('on' if state['mig'] else 'off')}, SM clock "
            f"{state['sm_clock_mhz']} of {state['max_sm_clock_mhz']} MHz before the work, memory clock "
            f"{state['memory_clock_mhz']} MHz, power limit {state['power_limit_w']} W, {state['memory_gib']} GiB"
        )
        lines += [f"- **{warning}**" for warning in state["warnings"]]
    say(lines[0])
    return Answer(result=result, markdown="\n".join(lines) + "\n")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):
        return False
