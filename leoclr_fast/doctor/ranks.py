"""Whether ranks can start and talk: torchrun, variables of NCCL and gloo, and both of these."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from leoclr_fast.doctor.result import Result, failed, not_applicable, warning

_LIMIT = timedelta(seconds=30)
_RENAMED = ("ASYNC_ERROR_HANDLING", "BLOCKING_WAIT", "DESYNC_DEBUG", "ENABLE_TIMING", "ENABLE_MONITORING")
"""NCCL_… of torch, which are TORCH_NCCL_… today."""
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs do not copy to each other directly",
    "NCCL_SHM_DISABLE": "GPUs of one machine talk over the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked",
}
_OTHER_TORCH = "Install another torch: see pytorch.org, Get Started."


def torchrun() -> Result:
    """The program that starts ranks, of this Python and not of another."""
    from torch.distributed.run import get_args_parser

    forwards = any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions)
    signals = "forwards SIGUSR1 by --signals-to-handle" if forwards else "forwards SIGTERM, but not SIGUSR1"
    remedy = "Activate the environment, or: `python -m torch.distributed.run` does the same."
    where = shutil.which("torchrun")
    if where is None:
        return warning(f"not on PATH; this torch {signals}", remedy)
    with open(where, "rb") as script:
        first = script.readline(4096).decode(errors="replace").split()
    python = first[0].removeprefix("#!") if first and first[0].startswith("#!") else ""
    if "python" in python and Path(python).parent.resolve() != Path(sys.executable).parent.resolve():
        return warning(f"{where} belongs to another Python ({python})", remedy)
    return Result(f"{where}, {signals}")


def communication_settings(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Result:
    """Variables of NCCL, gloo and CUDA that are left over from other machines or from a search for errors."""
    prefixes = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_LAUNCH_BLOCKING", "TORCH_DISTRIBUTED_DEBUG")
    settings = {name: value for name, value in environ.items() if name.startswith(prefixes)}
    result = Result(" ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "none set")
    interfaces = _interfaces(root)
    for name, value in settings.items():
        unset = f"`unset {name}`."
        if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") and not _names_one(value, interfaces):
            there = ", ".join(interfaces) or "none"
            result.fail(f"{name}={value} names no interface of this machine ({there})", unset)
        elif name.removeprefix("NCCL_") in _RENAMED:
            result.warn(f"{name} has no effect any more", f"Set TORCH_{name} instead.")
        elif name == "NCCL_IB_DISABLE" and not (root / "sys/class/infiniband").is_dir():
            continue
        elif name in _SLOW and value not in ("", "0", "OFF", "off"):
            result.warn(f"{name}={value}: {_SLOW[name]}, which is slow", unset)
        elif name == "NCCL_DEBUG" and value.upper() in ("INFO", "TRACE"):
            result.warn(f"{name}={value} prints a lot", unset)
    return result


def gloo() -> Result:
    """Two processes on this machine sum two tensors, as ranks on CPUs do."""
    import torch
    import torch.distributed as dist

    if not dist.is_gloo_available():
        return failed("this torch is built without gloo", _OTHER_TORCH)
    from_parent, to_child = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = dist.TCPStore("127.0.0.1", int(os.read(from_parent, 16)), is_master=False, timeout=_LIMIT)
            _sum_over("gloo", store, 1, 2, torch.tensor([1.0, 2.0]))
        except Exception:
            os._exit(1)
        os._exit(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_LIMIT)
    os.write(to_child, str(store.port).encode())
    try:
        total = _sum_over("gloo", store, 0, 2, torch.tensor([10.0, 20.0]))
    except RuntimeError as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        where = f" (GLOO_SOCKET_IFNAME={interface})" if interface else ""
        return failed(
            f"two processes cannot talk{where}: {str(error).splitlines()[0][:200]}",
            "Name the network interface, `export GLOO_SOCKET_IFNAME=lo` on one machine, or give the host name an "
            "address in /etc/hosts.",
        )
    os.waitpid(child, 0)
    if total != [11.0, 22.0]:
        return failed(f"the sum over two processes is {total}, not [11, 22]", "Install torch again.")
    return Result("two processes on this machine have summed their tensors")


def nccl() -> Result:
    """NCCL's version, a sum over it, and which GPUs reach each other directly."""
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count()
    if not count:
        return not_applicable("no GPU: ranks on CPUs use gloo")
    if not dist.is_nccl_available():
        return failed("this torch is built without NCCL", _OTHER_TORCH)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    torch.cuda.set_device(0)
    if _sum_over("nccl", dist.HashStore(), 0, 1, torch.ones(4, device="cuda")) != [1.0] * 4:
        return failed(f"NCCL {version}: the sum over one process is wrong", "Look at it with `NCCL_DEBUG=INFO`.")
    result = Result(f"NCCL {version}, one process has summed on GPU 0 of {count}")
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        remedy = "See `nvidia-smi topo -m`; in virtual machines and with ACS on, peer access is off."
        result.warn(f"GPUs that do not reach each other directly: {', '.join(apart)}", remedy)
    return result


def _sum_over(backend: str, store: Any, rank: int, world_size: int, tensor: Any) -> list[float]:
    import torch.distributed as dist

    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_LIMIT)
    dist.all_reduce(tensor)
    values: list[float] = tensor.cpu().tolist()
    dist.destroy_process_group()
    return values


def _interfaces(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "sys/class/net").glob("*"))


def _names_one(setting: str, interfaces: list[str]) -> bool:
    """As NCCL and gloo read it: prefixes, `=` for exact names, `^` for all but these."""
    if setting.startswith("^"):
        return True
    exact, names = setting.startswith("="), [name.strip() for name in setting.lstrip("=").split(",")]
    return any(interface == name if exact else interface.startswith(name) for name in names for interface in interfaces)
