"""Cores, threads and memory nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, Trouble, judged, not_applicable
from leoclr_fast.machine.control_groups import cpu_quota

_FEW_CORES = 2
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def cores(root: Path = Path("/")) -> Finding:
    """What this process may really use: its affinity and its quota, not what the machine has."""
    allowed, installed, quota = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota(root)
    load = os.getloadavg()[0]
    found = f"{allowed} of {installed} cores" + (f", a quota of {quota:g} cores' time" if quota is not None else "")
    troubles = []
    if quota is not None and quota < allowed:
        workers = max(1, int(quota))
        what = "the quota is less than the cores, so one worker a core is throttled"
        troubles.append(Trouble("warning", what, f"Give `--loader.workers {workers}`, or ask for more cores."))
    if min(allowed, quota or allowed) < _FEW_CORES:
        what = "one core cannot load images beside training"
        troubles.append(Trouble("warning", what, "Ask for more (SLURM: `--cpus-per-task 16`; Docker: `--cpus 16`)."))
    if load > installed:
        what = f"{load:.1f} programs want to run at a time"
        troubles.append(Trouble("warning", what, "Look who with `top`: figures measured now are worth little."))
    return judged(f"{found}, load {load:.1f}", troubles)


def threads(environ: Mapping[str, str] = os.environ) -> Finding:
    """Of torch and numba in this process, and the variables that set them."""
    import numba
    import torch

    from pipelines.cores import available_cores

    wanted = {name: environ[name] for name in _THREAD_VARIABLES if name in environ}
    troubles = [
        Trouble("warning", f"{name}={value} is no number of threads", f"`unset {name}`, or give a whole number.")
        for name, value in wanted.items()
        if not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(","))
    ]
    num_torch, num_numba, usable = torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS), available_cores()
    if num_torch > usable:
        what = f"torch takes {num_torch} threads on {usable} cores"
        troubles.append(Trouble("warning", what, f"`export OMP_NUM_THREADS={usable}`."))
    settings = " ".join(f"{name}={value}" for name, value in wanted.items()) or "no variable sets them"
    return judged(f"torch {num_torch}, numba {num_numba}, on {usable} cores; {settings}", troubles)


def numa(root: Path = Path("/")) -> Finding:
    """Memory nodes, and whether this process may use the cores beside each GPU."""
    import torch

    from leoclr_fast.machine.memory_nodes import gpu_node, node_cores

    nodes = node_cores(root)
    if len(nodes) < 2:
        return not_applicable(f"{len(nodes)} memory node: all memory is equally near")
    mine = os.sched_getaffinity(0)
    found = ", ".join(f"node {number}: {len(cpus & mine)} of {len(cpus)} cores" for number, cpus in nodes.items())
    troubles = []
    for gpu in range(torch.cuda.device_count()):
        node = gpu_node(gpu, root)
        if node is None:
            continue
        found += f"; GPU {gpu} at node {node}"
        if node in nodes and not nodes[node] & mine:
            what = f"no core beside GPU {gpu} may be used"
            remedy = "Ask for them (SLURM: `--gpu-bind=closest`; by hand: `numactl --cpunodebind`)."
            troubles.append(Trouble("warning", what, remedy))
    return judged(found, troubles)
