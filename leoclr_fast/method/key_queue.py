"""The FIFO of negatives. Legend: K keys in the queue, D dimensions, B keys of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The K newest keys, as a ring buffer; keys and pointer are buffers, so they are in every checkpoint.

    Any batch size works: the write wraps around the end. Starts with random unit vectors, as MoCo's.
    """

    keys: Tensor
    """[K, D], unit rows."""
    pointer: Tensor
    """int64 scalar: the row that the next key overwrites."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with `keys` [B, D], in place and without waiting for the device."""
        assert len(keys) <= len(self)
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self)
        self.keys.index_copy_(0, rows, keys.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(len(self))
