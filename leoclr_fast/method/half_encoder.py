"""What stands for the key encoder in half precision: a copy of its weights, rounded once a step."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from leoclr_fast.method.backbone import Encoder


class HalfEncoder(nn.Module):
    """The same function as an encoder under autocast, whose weights are rounded once a step and not in every pass.

    The batch-norms, whose weights stay in float32, are the encoder's own.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        norms = {id(norm): norm for norm in encoder.modules() if isinstance(norm, nn.BatchNorm2d)}
        self.encoder = deepcopy(encoder, norms)
        layers = [
            (source, copied.to(dtype))
            for source, copied in zip(encoder.modules(), self.encoder.modules(), strict=True)
            if isinstance(source, nn.Conv2d | nn.Linear)
        ]
        self._sources: list[Tensor] = [weight for source, _ in layers for weight in source.parameters()]
        self._targets: list[Tensor] = [weight for _, copied in layers for weight in copied.parameters()]
        self.refresh()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the encoder's weights, in place and all at once."""
        torch._foreach_copy_(self._targets, self._sources)
