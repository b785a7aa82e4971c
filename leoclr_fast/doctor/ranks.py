"""Whether ranks can talk."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta

from leoclr_fast.doctor.result import Result, failed


def gloo() -> Result:
    """Two processes on this machine sum two tensors, as ranks on CPUs do; on GPUs gloo carries what is not computed."""
    import torch
    import torch.distributed as dist

    def total(rank: int, store: str) -> list[float]:
        limit = timedelta(seconds=30)
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
        tensor = torch.tensor([1.0, 2.0]) * 10**rank
        dist.all_reduce(tensor)
        dist.destroy_process_group()
        values: list[float] = tensor.tolist()
        return values

    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                total(1, f"{folder}/store")
            finally:
                os._exit(0)
        try:
            found = total(0, f"{folder}/store")
        except RuntimeError as error:
            interface = os.environ.get("GLOO_SOCKET_IFNAME")
            where = f" (GLOO_SOCKET_IFNAME={interface})" if interface else ""
            return failed(
                f"two processes cannot talk{where}: {str(error).splitlines()[0][:200]}",
                "Name the network interface, `export GLOO_SOCKET_IFNAME=lo` on one machine, or give the host name an "
                "address in /etc/hosts.",
            )
        os.waitpid(child, 0)
    if found != [11.0, 22.0]:
        return failed(f"the sum over two processes is {found}, not [11, 22]", "Install torch again.")
    return Result("two processes on this machine have summed their tensors")
