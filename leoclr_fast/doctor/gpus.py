"""GPUs, their driver, and what they can compute."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed, not_applicable, warning


def gpus() -> Result:
    """Each visible GPU: name, memory, compute capability, who else uses it, and whether it computes rightly."""
    import torch

    from leoclr_fast.machine.gpu_state import gpu_state

    if not torch.cuda.device_count():
        return explain_no_gpu(torch.version.cuda)
    states = [gpu_state(torch.device("cuda", number)) or {} for number in range(torch.cuda.device_count())]
    result = Result(
        "; ".join(
            f"{number}: {state['name']}, {state['memory_gib']} GiB, compute capability {state['compute_capability']}"
            for number, state in enumerate(states)
        )
    )
    a = torch.arange(64, dtype=torch.float32).view(8, 8)
    for number, state in enumerate(states):
        for text in state["warnings"]:
            shared = "Look who with `nvidia-smi`, or choose others by CUDA_VISIBLE_DEVICES."
            result.warn(f"{number}: {text}", shared)
        device = torch.device("cuda", number)
        try:
            right = torch.equal((a.to(device) @ a.to(device)).cpu(), a @ a)
            wrong = "a product of small whole numbers is wrong"
        except RuntimeError as error:
            right, wrong = False, f"it cannot compute ({str(error).splitlines()[0]})"
        if not right:
            result.fail(f"{number}: {wrong}", "Install a torch built for it: see pytorch.org, Get Started.")
    return result


def explain_no_gpu(
    cuda_of_torch: str | None, environ: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> Result:
    """Why torch sees no GPU: because there is none, or because something is between them."""
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
    if cuda_of_torch is None:
        return failed(f"{signs}: this torch is built without CUDA", "Install one with: see pytorch.org, Get Started.")
    if not devices:
        return failed(signs, "Hand the GPUs to the container: `docker run --gpus all` (SLURM: `--gpus-per-node 8`).")
    return failed(signs, "Compare the driver of `nvidia-smi` with the CUDA of torch, and look at `dmesg` for errors.")


def driver() -> Result:
    """The driver's CUDA version against that of torch's build."""
    import torch

    if torch.version.cuda is None:
        return not_applicable("this torch is built without CUDA")
    version = _driver_cuda_version()
    if version is None:
        return not_applicable(f"no NVIDIA driver; torch is built for CUDA {torch.version.cuda}")
    return compare_cuda(version, torch.version.cuda)


def compare_cuda(driver_version: int, build: str) -> Result:
    """driver_version: as cuDriverGetVersion says, 13020 is 13.2. build: as torch says, "13.2"."""
    of_driver = driver_version // 1000, driver_version % 1000 // 10
    major, minor = (int(part) for part in build.split(".")[:2])
    found = f"the driver has CUDA {of_driver[0]}.{of_driver[1]}, torch is built for {build}"
    if of_driver[0] < major:
        remedy = f"Update the driver, or install a torch for CUDA {of_driver[0]}: see pytorch.org, Get Started."
        return failed(f"{found}: too old", remedy)
    if of_driver < (major, minor):
        return Result(f"{found}: older, but compatible within CUDA {major}")
    return Result(found)


def _driver_cuda_version() -> int | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value else None
