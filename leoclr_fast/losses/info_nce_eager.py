"""InfoNCE in plain torch. Legend: B queries, D dimensions, K negatives, P positives of each query."""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce_eager(query: Tensor, keys: tuple[Tensor, ...], queue: Tensor, temperature: float) -> Tensor:
    """Sum over the positives of the batch mean of -log(exp(s) / (exp(s) + sum of exp(negative logits))).

    The negatives are the same for every positive, so they are multiplied once: with L = logsumexp(q Q^T / t) and
    s = q k / t, the loss of a positive is logaddexp(s, L) - s. Logits of half precision are reduced in float32.
    """
    negative_logits = _at_least_float32(query @ queue.detach().mT / temperature)  # [B, K]
    negatives = torch.logsumexp(negative_logits, dim=1)  # [B]
    wide_query = _at_least_float32(query)
    loss = negatives.new_zeros(())
    for key in keys:
        positive = (wide_query * key.detach()).sum(dim=1) / temperature  # [B]
        loss = loss + (torch.logaddexp(positive, negatives) - positive).mean()
    return loss


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
