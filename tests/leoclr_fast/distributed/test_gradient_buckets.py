"""Gradients that are summed over ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.gradient_buckets import GradientBuckets


@dataclass(frozen=True)
class Twin(Ranks):
    """One of two ranks, the other of which always has the same gradients."""

    world_size: int = 2
    sent: list[int] = field(default_factory=list)
    """The numbers of values of what was sent."""
    ended: list[int] = field(default_factory=list)

    def begin_all_reduce_sum(self, buffer: Tensor) -> Callable[[], None]:
        self.sent.append(buffer.numel())

        def wait() -> None:
            buffer.mul_(2)
            self.ended.append(buffer.numel())

        return wait


class TellsWhenItIsReached(torch.autograd.Function):
    """The identity, which notes what its gradient finds sent."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Twin, found: list[list[int]]) -> Tensor:
        ctx.ranks, ctx.found = ranks, found
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.found.append(list(ctx.ranks.sent))
        return gradient, None, None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 2, bias=False))
    return layers.double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_losses", [1, 3])
def test_buckets_are_summed_in_their_order_while_the_backward_pass_goes_on(num_losses: int) -> None:
    """Buckets of one layer each, in two steps: values, strides, places, and what was sent when."""
    layers, ranks = network(), Twin()
    weights = list(layers.parameters())
    buckets = GradientBuckets(weights, ranks, bucket_bytes=64)
    images = torch.randn(num_losses, 2, 4, 6, 6, dtype=torch.float64)
    places = []
    for _ in range(2):
        found: list[list[int]] = []
        layers.zero_grad()
        ranks.sent.clear()
        buckets.begin(num_losses)
        for part in images:
            hidden = TellsWhenItIsReached.apply(layers[0](part.to(memory_format=torch.channels_last)), ranks, found)
            layers[2](layers[1](hidden)).square().mean().backward()
        assert found == [[]] * (num_losses - 1) + [[16, 8]]  # of the last loss, before the first layer's gradient
        assert ranks.sent == [16, 8, 108]
        buckets.finish()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        expected = torch.autograd.grad(sum(layers(part).square().mean() for part in images), weights)
        for gradient, truth, weight in zip(gradients, expected, weights, strict=True):
            torch.testing.assert_close(gradient, 2 * truth, rtol=1e-12, atol=1e-14)
            assert gradient.stride() == weight.stride()
        places.append([gradient.data_ptr() for gradient in gradients])
        assert places[-1][2] - places[-1][1] == -2 * 8  # the bias of the second layer lies before its weight
    assert places[0] == places[1]


def test_weights_without_a_gradient_keep_nobody_waiting() -> None:
    layers, ranks = network(), Twin()
    buckets = GradientBuckets(list(layers.parameters()), ranks, bucket_bytes=1 << 20)
    buckets.begin(1)
    layers[0](torch.ones(1, 4, 3, 3, dtype=torch.float64)).sum().backward()
    assert ranks.sent == []
    buckets.finish()
    assert ranks.sent == ranks.ended == [132]
    assert torch.equal(layers[0].weight.grad, torch.full_like(layers[0].weight, 2))
    assert layers[2].weight.grad is None


def test_a_single_rank_keeps_its_gradients() -> None:
    layers = network()
    buckets = GradientBuckets(list(layers.parameters()), Ranks())
    buckets.begin(1)
    layers(torch.ones(1, 4, 6, 6, dtype=torch.float64)).sum().backward()
    before = [weight.grad for weight in layers.parameters()]
    buckets.finish()
    assert all(weight.grad is gradient for weight, gradient in zip(layers.parameters(), before, strict=True))
