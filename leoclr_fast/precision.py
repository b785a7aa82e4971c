"""What `--precision` means for the encoders."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def encoder_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context that an encoder's forward pass runs in: autocast for bf16 and fp16, nothing otherwise."""
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()


def encoder_dtype(precision: str) -> torch.dtype:
    """The dtype of the views and of the weights outside autocast: float32, or float64 for fp64."""
    return torch.float64 if precision == "fp64" else torch.float32
