"""Whether ranks can talk, by NCCL and by gloo."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from leoclr_fast.doctor.result import Result, failed, not_applicable

_LIMIT = timedelta(seconds=30)
_OTHER_TORCH = "Install another torch: see pytorch.org, Get Started."


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
