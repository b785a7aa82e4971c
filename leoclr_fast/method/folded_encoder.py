"""An encoder whose batch-norms use running statistics is one of convolutions alone: they absorb the batch-norms."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from leoclr_fast.method.backbone import Encoder


class FoldedEncoder(nn.Module):
    """The same function as an encoder in inference mode, with each batch-norm folded into the convolution before it.

    Its weights are its own, and `refresh` computes them anew from the encoder's; the projection head is shared.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        folded = deepcopy(encoder).requires_grad_(False)
        folded.projection_head = encoder.projection_head
        self.encoder = folded
        # In tuples, so that the encoder's own modules do not become submodules of this one.
        self._sources = tuple((conv, norm) for _, conv, _, norm in _pairs(encoder))
        self._targets = []
        for parent, conv, name, _ in list(_pairs(folded)):
            assert conv.bias is None
            conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), requires_grad=False)
            setattr(parent, name, nn.Identity())
            self._targets.append((conv.weight, conv.bias))
        self.refresh()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the encoder's weights and running statistics: w' = w g / s and b' = b - m g / s, with
        s = sqrt(v + eps), in place and without waiting for the device."""
        weights, scales, biases = [], [], []
        for conv, norm in self._sources:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weights.append(conv.weight)
            scales.append(scale[:, None, None, None])
            biases.append(norm.bias - norm.running_mean * scale)
        torch._foreach_copy_([weight for weight, _ in self._targets], torch._foreach_mul(weights, scales))
        torch._foreach_copy_([bias for _, bias in self._targets], biases)


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv2d, str, nn.BatchNorm2d]]:
    """Each convolution of a ResNet with the batch-norm behind it: (parent, convolution, name of the batch-norm,
    batch-norm). In torchvision's order of definition a convolution always stands before its batch-norm.
    """
    for parent in network.modules():
        children = list(parent.named_children())
        named = dict(children)
        for place, (name, child) in enumerate(children):
            if isinstance(child, nn.BatchNorm2d):
                before = named[name.replace("bn", "conv")] if name.startswith("bn") else children[place - 1][1]
                assert isinstance(before, nn.Conv2d)
                yield parent, before, name, child
