"""What `--gradient-compression` means for the sum of the gradients over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.collectives import Ranks

_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def wire_dtype(speed: SpeedConfig, ranks: Ranks, device: torch.device) -> torch.dtype | None:
    """The dtype that gradients travel in between ranks; None if they are not rounded. On one rank nothing travels.

    Asks the backend, on all ranks together. Raises ValueError for fp64, or for a backend that cannot sum this dtype.
    """
    if speed.gradient_compression == "none" or ranks.world_size == 1:
        return None
    if speed.precision == "fp64":
        raise ValueError(
            f"--gradient-compression {speed.gradient_compression} would round the gradients of --precision fp64, which "
            "is there as a truth; choose --gradient-compression none or another --precision"
        )
    dtype = _WIRE_DTYPES[speed.gradient_compression]
    try:
        ranks.all_reduce_sum([torch.ones(1, device=device)], dtype)
    except RuntimeError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"--gradient-compression {speed.gradient_compression} is not possible: the backend {dist.get_backend()} "
            f"cannot sum {dtype} ({reason}); choose another one, or none"
        ) from error
    return dtype
