"""What tests on a GPU share: they need one, and convolutions to be held against those of another run or of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(without)


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """No choice of an algorithm by its speed, and no TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
