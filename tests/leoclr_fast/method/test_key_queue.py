"""The queue, with exact values through a wrap."""

from __future__ import annotations

import torch

from leoclr_fast.method.key_queue import KeyQueue


def rows(*values: int) -> torch.Tensor:
    return torch.tensor([[float(value)] * 2 for value in values])


def test_exact_values_through_a_wrap() -> None:
    queue = KeyQueue(5, 2)
    start = queue.keys.clone()
    storage = queue.keys.data_ptr()
    queue.enqueue(rows(1, 2, 3))
    assert queue.pointer.item() == 3
    torch.testing.assert_close(queue.keys, torch.cat([rows(1, 2, 3), start[3:]]))
    queue.enqueue(rows(4, 5, 6))
    assert queue.pointer.item() == 1
    assert queue.keys[:, 0].tolist() == [6, 2, 3, 4, 5]
    queue.enqueue(rows(7, 8, 9, 10))
    assert queue.pointer.item() == 0
    assert queue.keys[:, 0].tolist() == [6, 7, 8, 9, 10]
    queue.enqueue(rows(1, 2, 3, 4, 5))
    assert queue.keys[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert queue.keys.data_ptr() == storage  # in place


def test_starts_with_random_unit_vectors() -> None:
    keys = KeyQueue(100, 16).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(100))
    assert (keys @ keys.T - torch.eye(100)).abs().max() < 0.95
