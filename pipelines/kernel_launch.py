"""One launch of a Triton kernel: what a device runs is what is compiled ahead of time on a machine without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Argument = Tensor | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLaunch:
    """A kernel with everything it is given."""

    kernel: Any
    """A function under ``triton.jit``."""
    grid: tuple[int, ...]
    """Programs along each axis, at most three."""
    arguments: Mapping[str, Argument]
    """By name, in the kernel's order; known when it runs."""
    constants: Mapping[str, Any]
    """By name; known when it is compiled."""
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch it on the current device, without waiting."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """For Triton's compiler. Products and sums are fused, whatever the version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
