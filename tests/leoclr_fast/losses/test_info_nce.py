"""The loss against two cross entropies in float64, and against float64 from lower precision."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leoclr_fast.losses.info_nce import info_nce


def cross_entropies(query: Tensor, keys: list[Tensor], queue: Tensor, temperature: float) -> Tensor:
    """The published form: explicit logits, the positive first, one cross entropy for each positive."""
    total = query.new_zeros(())
    for key in keys:
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature
        total = total + F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    return total


def unit_vectors(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


@pytest.mark.parametrize(("B", "K", "D", "P"), [(4, 16, 8, 1), (7, 123, 33, 2), (252, 507, 128, 2), (3, 5, 2, 4)])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_value_and_gradient_equal_cross_entropies(B: int, K: int, D: int, P: int, temperature: float) -> None:
    query = unit_vectors(B, D, 0).requires_grad_()
    keys = [unit_vectors(B, D, 1 + number) for number in range(P)]
    queue = unit_vectors(K, D, 99)
    loss, truth = info_nce(query, keys, queue, temperature), cross_entropies(query, keys, queue, temperature)
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(loss, query)
    (true_gradient,) = torch.autograd.grad(truth, query)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-11, atol=1e-15)


def test_large_logits_do_not_overflow() -> None:
    """Vectors that are not of unit length: logits up to 1e4 stay finite and exact."""
    query, queue = 50 * unit_vectors(5, 8, 0), 50 * unit_vectors(40, 8, 1)
    keys = [50 * unit_vectors(5, 8, 2)]
    torch.testing.assert_close(
        info_nce(query, keys, queue, 0.2), cross_entropies(query, keys, queue, 0.2), rtol=1e-13, atol=0
    )
    single = info_nce(query.float(), [keys[0].float()], queue.float(), 0.2)
    torch.testing.assert_close(single.double(), cross_entropies(query, keys, queue, 0.2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_its_inputs(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs: what is left is the rounding of the product, not of the sum."""
    query, keys, queue = unit_vectors(64, 128, 0), [unit_vectors(64, 128, 1)], unit_vectors(4096, 128, 2)
    rounded = [tensor.to(dtype) for tensor in (query, keys[0], queue)]
    loss = info_nce(rounded[0], [rounded[1]], rounded[2], 0.2)
    truth = cross_entropies(rounded[0].double(), [rounded[1].double()], rounded[2].double(), 0.2)
    assert loss.dtype == torch.float32
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    assert abs(loss.double() - truth) / truth < tolerance


def test_no_gradient_reaches_keys_or_queue() -> None:
    query, key, queue = (unit_vectors(rows, 8, rows).requires_grad_() for rows in (4, 4, 16))
    key = unit_vectors(4, 8, 7).requires_grad_()
    info_nce(query, [key], queue, 0.2).backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager() -> None:
    query, queue = unit_vectors(12, 16, 0).requires_grad_(), unit_vectors(50, 16, 1)
    keys = [unit_vectors(12, 16, 2), unit_vectors(12, 16, 3)]
    eager, compiled = (info_nce(query, keys, queue, 0.2, impl) for impl in ("eager", "compiled"))
    torch.testing.assert_close(compiled, eager, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(loss, query)[0] for loss in (compiled, eager)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-15)
