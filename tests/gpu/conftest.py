"""What tests on a GPU share: convolutions whose results can be held against those of another run, or of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """No choice of an algorithm by its speed, and no TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
