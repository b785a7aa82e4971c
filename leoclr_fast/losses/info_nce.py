"""InfoNCE over a queue of negatives, with any number of positives per query: the one door to its implementations.

Legend: B queries, D dimensions, K negatives, P positives of each query.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from leoclr_fast.losses.info_nce_eager import info_nce_eager

log = logging.getLogger(__name__)

InfoNCEImpl = Literal["auto", "eager", "compiled", "triton"]


def info_nce(
    query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float, impl: InfoNCEImpl = "auto"
) -> Tensor:
    """Sum over the positives of the batch mean of eq. 1 of the paper: LeOCLR's loss with two keys, MoCo-v2's with one.

    query: [B, D]; keys: P tensors [B, D]; queue: [K, D], all L2-normalised and of one floating dtype. The keys and
    the queue receive no gradient. Returns a scalar, float32 for half precision inputs.

    impl: `eager` and `compiled` are the same mathematics, the second through torch.compile; `auto` takes
    `compiled` on a GPU where a C compiler and Triton are found (else it says what is missing), and `eager` elsewhere.
    Raises ValueError for shapes that do not fit, an unknown `impl` or one that does not exist yet.
    """
    _check_shapes(query, keys, queue, temperature)
    if impl == "auto":
        impl = "compiled" if query.is_cuda and _can_compile() else "eager"
    if impl == "eager":
        return info_nce_eager(query, tuple(keys), queue, temperature)
    if impl == "compiled":
        return _compiled()(query, tuple(keys), queue, temperature)
    raise ValueError(f"InfoNCE implementation {impl!r} is not available; choose auto, eager or compiled")


@cache
def _can_compile() -> bool:
    """Whether torch.compile can work on a GPU here; says why not, once."""
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    missing = "a C compiler (gcc or clang)" if not any(shutil.which(name) for name in compilers if name) else ""
    missing = missing or ("" if importlib.util.find_spec("triton") else "the package triton")
    if missing:
        log.warning("the loss is not compiled because %s is missing; the eager one runs instead", missing)
    return not missing


@cache
def _compiled() -> Callable[[Tensor, tuple[Tensor, ...], Tensor, float], Tensor]:
    return torch.compile(info_nce_eager, dynamic=False)


def _check_shapes(query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float) -> None:
    if not keys:
        raise ValueError("InfoNCE needs at least one positive key per query, but `keys` is empty")
    if query.ndim != 2 or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and queue {tuple(queue.shape)} do not fit: give query [B, D] and queue [K, D]"
        )
    for key in keys:
        if key.shape != query.shape:
            raise ValueError(f"each key must have the query's shape {tuple(query.shape)}, not {tuple(key.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not allowed: give a positive number")
