"""InfoNCE over a queue of negatives, with any number of positives per query: the one door to its implementations.

Legend: B queries, D dimensions, K negatives, P positives of each query.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from leoclr_fast.config import InfoNCEImpl
from leoclr_fast.losses.info_nce_eager import info_nce_eager
from leoclr_fast.machine.compiling import what_compiling_lacks

log = logging.getLogger(__name__)


def info_nce(
    query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float, impl: InfoNCEImpl = "auto"
) -> Tensor:
    """Sum over the positives of the batch mean of eq. 1 of the paper: LeOCLR's loss with two keys, MoCo-v2's with one.

    query: [B, D]; keys: P tensors [B, D]; queue: [K, D], all L2-normalised and of one floating dtype. The keys and
    the queue receive no gradient. Returns a scalar, float32 for half precision inputs.

    impl: `eager` and `compiled` are the same mathematics, the second through torch.compile; `triton` is the fused
    kernel, which never holds B x K numbers, and gives no second derivative. `auto` takes `triton` on a GPU, or
    `compiled` where the kernel cannot run, and `eager` on a CPU, for float64, and where a C compiler or Triton is
    missing, which it says.
    Raises ValueError for `triton` where it cannot run.
    """
    if impl == "auto":
        impl = _choose(query, keys, queue)
    if impl == "eager":
        return info_nce_eager(query, tuple(keys), queue, temperature)
    if impl == "compiled":
        return _compiled()(query, tuple(keys), queue, temperature)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("loss_impl triton needs the package triton: install it, or choose auto or eager")
    from leoclr_fast.losses.info_nce_triton import info_nce_triton

    return info_nce_triton(query, keys, queue, temperature)


def _choose(query: Tensor, keys: Sequence[Tensor], queue: Tensor) -> Literal["eager", "compiled", "triton"]:
    if not query.is_cuda or query.dtype == torch.float64 or not _can_compile():
        return "eager"
    obstacle = _what_is_wrong_with_triton(query.device)
    if obstacle is None:
        from leoclr_fast.losses.info_nce_triton import what_keeps_triton_out

        obstacle = what_keeps_triton_out(query, keys, queue)
    return "triton" if obstacle is None else "compiled"


@cache
def _can_compile() -> bool:
    """Whether Triton and torch.compile can work on a GPU here; says why not, once."""
    missing = what_compiling_lacks("cuda")
    if missing:
        log.warning("the loss is not fused because %s is missing; the eager one runs instead", missing)
    return not missing


@cache
def _what_is_wrong_with_triton(device: torch.device) -> str | None:
    """Runs the kernel on one query, or says why it cannot, once: it makes things faster, and must not stop a run."""
    try:
        from leoclr_fast.losses.info_nce_triton import info_nce_triton

        row = torch.zeros(1, 16, device=device)
        info_nce_triton(row, [row], row, 1.0)
    except Exception as error:
        log.warning("the loss is compiled by torch, since the Triton kernel does not work here: %r", error)
        return repr(error)
    return None


@cache
def _compiled() -> Callable[[Tensor, tuple[Tensor, ...], Tensor, float], Tensor]:
    return torch.compile(info_nce_eager, dynamic=False)
