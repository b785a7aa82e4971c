"""What stands for the key encoder in a step: copies of its weights as its passes need them, made once a step."""

from __future__ import annotations

from collections.abc import Iterator
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


class FoldedEncoder(nn.Module):
    """The same function as an encoder in inference mode, with each batch-norm folded into the convolution before it:
    if all use running statistics, the convolutions absorb them.

    Its weights are its own, and `refresh` computes them anew from the encoder's.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        """dtype: what the passes compute in, as under autocast."""
        super().__init__()
        folded = deepcopy(encoder).requires_grad_(False)
        # In tuples, so that the encoder's own modules do not become submodules of this one.
        self._sources = tuple((conv, norm) for _, conv, _, norm in _pairs(encoder))
        self._head = tuple(encoder.projection_head.parameters())
        convolutions = []
        for parent, conv, name, _ in list(_pairs(folded)):
            assert conv.bias is None
            conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), requires_grad=False)
            setattr(parent, name, nn.Identity())
            convolutions.append(conv)
        self.encoder = folded.to(dtype)
        self._targets: list[Tensor] = [conv.weight for conv in convolutions]
        self._targets += [conv.bias for conv in convolutions if conv.bias is not None]
        self._targets += folded.projection_head.parameters()
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
        torch._foreach_copy_(self._targets, [*torch._foreach_mul(weights, scales), *biases, *self._head])


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
