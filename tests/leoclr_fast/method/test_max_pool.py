"""The stem's max-pooling by gathering, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from leoclr_fast.method.max_pool import GatheringMaxPool


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (112, 111), (1, 5), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_torchs(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Also where a window has its maximum several times, as behind a ReLU, or a NaN; half precision is summed in
    float32 and rounded once."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size).relu()
    images[0, 0, 0, 0] = float("nan")
    ours = images.to(dtype, copy=True).requires_grad_()
    truth = ours.detach().double().requires_grad_()
    pooled, expected = GatheringMaxPool.apply(ours), F.max_pool2d(truth, 3, 2, 1)
    torch.testing.assert_close(pooled, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    weights = torch.randn(pooled.shape).to(dtype)
    gradient, expected_gradient = torch.autograd.grad([pooled, expected], [ours, truth], [weights, weights.double()])
    tolerance = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=tolerance, atol=tolerance)
