"""The key encoder as the exponential moving average of the query encoder."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_key_encoder(
    key_encoder: nn.Module, query_encoder: nn.Module, momentum: float, *, include_buffers: bool = False
) -> None:
    """key <- momentum * key + (1 - momentum) * query, in place, for all parameters in one call.

    The storage never moves, so a captured graph stays valid. include_buffers: also the running statistics of
    batch-norm (EMAN); counters are copied.
    """
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)
    if include_buffers:
        for key, query in zip(key_encoder.buffers(), query_encoder.buffers(), strict=True):
            if key.is_floating_point():
                key.lerp_(query, 1 - momentum)
            else:
                key.copy_(query)
