"""Compiled implementations of an operation: which one runs where, how Triton's are launched and Numba's compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Impl = Literal["auto", "torch", "numba", "triton"]
Argument = Tensor | int | float


@cache
def automatic_impl(device: torch.device, done: str, attempt: Callable[[Impl, torch.device], object]) -> Impl:
    """Triton on a GPU and numba on a CPU where they work; else torch.

    done: what is done to views, a participle. attempt: does it once, to the least input there is. Why it fails is said
    once: kernels make things faster, and must not stop a run.
    """
    impls: dict[str, Impl] = {"cuda": "triton", "cpu": "numba"}
    impl = impls.get(device.type, "torch")
    try:
        if impl != "torch":
            attempt(impl, device)
    except Exception as error:
        log.warning("views are %s by torch, many times slower, since %s does not work here: %r", done, impl, error)
        return "torch"
    return impl


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLaunch:
    """One launch of a Triton kernel: what a device runs is what is compiled ahead of time on a machine without one."""

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


def compile_by_numba(function: Callable[..., None], signature: Any, what: str) -> Callable[..., None]:
    """A function as machine code that does without Python's lock, from numba's cache on the disk where there is one.

    signature: numba's. what: the function, to a reader of the log. The cache looks at the function's own file alone:
    what it is compiled of belongs there too.
    """
    from numba import njit

    def compiled(*, cached: bool) -> Callable[..., None]:
        dispatcher: Any = njit(nogil=True, error_model="numpy", cache=cached)(function)
        dispatcher.compile(signature)
        return dispatcher

    try:
        return compiled(cached=True)
    except (OSError, RuntimeError) as error:  # no folder to write to, or no space
        log.info("numba's cache is out of use, so that %s is compiled anew in every process: %s", what, error)
        return compiled(cached=False)
