"""Linear classifiers side by side: one matrix product for all of them, a learning rate for each.

Legend: G classifiers, B images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_FIRST_STD = 0.01


class LinearClassifiers:
    """G linear classifiers, trained by SGD with momentum on the same features; none of them sees the others.

    They begin alike: weights of a normal distribution (0.01) and no bias, as MoCo's. The gradient of the cross entropy
    is written out, so that features need no graph: with p = softmax(logits), ∂loss/∂logits = (p - onehot) / B.
    """

    def __init__(
        self,
        lrs: Sequence[float],
        num_features: int,
        num_classes: int,
        *,
        momentum: float,
        weight_decay: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: of the features, and of all arithmetic. device: where the features are."""
        generator = torch.Generator().manual_seed(seed)
        first = _FIRST_STD * torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
        self.lrs = tuple(lrs)
        self.weight = first.to(device, dtype).repeat(len(self.lrs), 1, 1)
        """[G, C, D]"""
        self.bias = torch.zeros(len(self.lrs), num_classes, device=device, dtype=dtype)
        """[G, C]"""
        self._weight_momentum, self._bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._lrs = torch.tensor(self.lrs, device=device, dtype=dtype)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Of features [B, D]: [G, B, C]."""
        return torch.einsum("bd,gcd->gbc", features, self.weight) + self.bias[:, None]

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, lr_factor: float = 1.0) -> Tensor:
        """One step of SGD on the mean cross entropy of a batch: features [B, D], labels int64 [B].

        lr_factor: multiplies every learning rate. Returns the losses before the step: [G].
        """
        logits = self.logits(features)
        log_p = F.log_softmax(logits, dim=2)
        target = labels.expand(len(self.lrs), -1)[:, :, None]  # [G, B, 1]
        losses = -log_p.gather(2, target).mean(dim=(1, 2))
        slope = log_p.exp()
        slope.scatter_add_(2, target, -torch.ones_like(target, dtype=slope.dtype))
        slope /= len(features)
        weight_gradient = torch.einsum("gbc,bd->gcd", slope, features).add_(self.weight, alpha=self._weight_decay)
        bias_gradient = slope.sum(dim=1).add_(self.bias, alpha=self._weight_decay)
        self._weight_momentum.mul_(self._momentum).add_(weight_gradient)
        self._bias_momentum.mul_(self._momentum).add_(bias_gradient)
        lrs = lr_factor * self._lrs
        self.weight -= lrs[:, None, None] * self._weight_momentum
        self.bias -= lrs[:, None] * self._bias_momentum
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """All that a continued training needs."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "weight_momentum": self._weight_momentum,
            "bias_momentum": self._bias_momentum,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
