"""GPUs, and why there may be none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed, not_applicable, warning


def gpus() -> Result:
    """Each visible GPU: name, memory, compute capability, driver, and who else uses it."""
    import torch

    from leoclr_fast.machine.gpu_state import gpu_state

    if not torch.cuda.device_count():
        return explain_no_gpu()
    states = [gpu_state(torch.device("cuda", number)) or {} for number in range(torch.cuda.device_count())]
    result = Result(
        "; ".join(
            f"{number}: {state['name']}, {state['memory_gib']} GiB, compute capability {state['compute_capability']}, "
            f"driver {state['driver']}"
            for number, state in enumerate(states)
        )
    )
    for number, state in enumerate(states):
        for text in state["warnings"]:
            shared = "Look who with `nvidia-smi`, or choose others by CUDA_VISIBLE_DEVICES."
            result.warn(f"{number}: {text}", shared)
    return result


def explain_no_gpu(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Result:
    """Why torch sees no GPU: because there is none, or because something is between them."""
    import torch

    devices = sorted((root / "dev").glob("nvidia[0-9]*"))
    driver = (root / "proc/driver/nvidia/version").exists()
    if not devices and not driver:
        return not_applicable("no GPU: training runs on the CPU, for demos and tests")
    signs = (
        f"{len(devices)} NVIDIA device files in /dev, {'a' if driver else 'no'} driver loaded, but torch sees no GPU"
    )
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden or hidden.startswith("-")):
        return warning(f"{signs}: CUDA_VISIBLE_DEVICES={hidden!r} hides all", "`unset CUDA_VISIBLE_DEVICES`.")
    if not devices:
        return failed(signs, "Hand the GPUs to the container: `docker run --gpus all` (SLURM: `--gpus-per-node 8`).")
    try:
        torch.cuda.init()  # says why not: built without CUDA, a driver that is too old
    except (AssertionError, RuntimeError) as error:
        signs += f" ({str(error).splitlines()[0]})"
    remedy = "Update the driver, or install a torch for the CUDA that `nvidia-smi` shows: see pytorch.org, Get Started."
    return failed(signs, f"{remedy} Errors of the driver stand in `dmesg`.")
