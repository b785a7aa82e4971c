"""What `--precision` means for the encoders, and which one a device gets that nobody chose one for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from leoclr_fast.config import Precision

_HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}


Options = TypeVar("Options")


def settled(options: Options, device: torch.device) -> Options:
    """The options, a dataclass with a `precision`, with one that the device computes in place of `auto`.

    Raises ValueError, with what to choose instead, for one that the device has no arithmetic of.
    """
    given: Any = options
    if given.precision == "auto":
        given = replace(given, precision=automatic_precision(device)[0])
    require_precision(given.precision, device)
    return given


def automatic_precision(device: torch.device) -> tuple[Precision, str]:
    """What `auto` means on a device, and why: bf16 where a GPU computes it, else fp16; fp32 on a CPU."""
    if device.type != "cuda":
        return "fp32", f"auto on a {device.type.upper()}"
    return ("bf16", "auto: the GPU computes it") if _computes_bf16(device) else ("fp16", "auto: the GPU has no bf16")


def encoder_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context that an encoder's forward pass runs in: autocast for bf16 and fp16, nothing otherwise."""
    if precision in _HALF_DTYPES:
        return torch.autocast(device.type, _HALF_DTYPES[precision])
    return nullcontext()


def encoder_dtype(precision: str) -> torch.dtype:
    """The dtype of the weights outside autocast: float32, or float64 for fp64. Raises KeyError for `auto`."""
    return _WEIGHT_DTYPES[precision]


def view_dtype(precision: str) -> torch.dtype:
    """The dtype that the first convolution computes in: views that have it already need not be converted there."""
    return _HALF_DTYPES.get(precision) or encoder_dtype(precision)


def require_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError, with what to choose instead, if the device has no arithmetic of this precision."""
    if precision == "bf16" and device.type == "cuda" and not _computes_bf16(device):
        raise ValueError(
            f"--precision bf16 needs a GPU of compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} "
            f"has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}; choose fp16 or fp32"
        )


def _computes_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
