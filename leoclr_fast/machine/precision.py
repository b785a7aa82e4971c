"""What `--precision` means for the encoders."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def encoder_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context that an encoder's forward pass runs in: autocast for bf16 and fp16, nothing otherwise."""
    if precision in _HALF_DTYPES:
        return torch.autocast(device.type, _HALF_DTYPES[precision])
    return nullcontext()


def encoder_dtype(precision: str) -> torch.dtype:
    """The dtype of the weights outside autocast: float32, or float64 for fp64."""
    return torch.float64 if precision == "fp64" else torch.float32


def view_dtype(precision: str) -> torch.dtype:
    """The dtype that the first convolution computes in: views that have it already need not be converted there."""
    return _HALF_DTYPES.get(precision, encoder_dtype(precision))


def require_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError, with what to choose instead, if the device has no arithmetic of this precision."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"--precision bf16 needs a GPU of compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} "
            f"has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}; choose fp16 or fp32"
        )
