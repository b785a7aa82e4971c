"""The encoders: torchvision's ResNets, with a stem for small images and any width, and MoCo-v2's projection head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from leoclr_fast.config import Architecture, BackboneConfig
from leoclr_fast.method.max_pool import MaxPool

_Block = type[BasicBlock | Bottleneck]
ARCHITECTURES: dict[Architecture, tuple[_Block, tuple[int, int, int, int], dict[str, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), {"groups": 64, "width_per_group": 4}),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), {"width_per_group": 128}),
}
"""Name -> block, number of blocks in each stage, and what torchvision's ResNet takes besides."""
_STAGE_CHANNELS = (64, 128, 256, 512)
_SAFE_CHANNELS = 16


class Backbone(ResNet):
    """A ResNet without its classifier, which takes its images in the memory format of its weights."""

    feature_dim: int

    def forward(self, images: Tensor) -> Tensor:
        return self.late(self.early(images))

    def early(self, images: Tensor) -> Tensor:
        """All but the last stage, with a third of the weights and most of the work."""
        channels_last = self.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        images = images.contiguous(memory_format=memory_format)
        pooled = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer3(self.layer2(self.layer1(pooled)))
        return features

    def late(self, features: Tensor) -> Tensor:
        """The last stage."""
        pooled: Tensor = self.fc(self.avgpool(self.layer4(features)).flatten(1))
        return pooled


class NarrowShortcut(nn.Conv2d):
    """A 1 x 1 convolution of few channels, contiguous on a CPU whatever the memory format around it.

    With fewer input channels than the vectors of the CPU have lanes (8 with AVX2, 16 with AVX-512), the backward pass
    of oneDNN's channels-last strided 1 x 1 convolution writes over other memory: it crashes, hangs or goes on
    (oneDNN issue 6035; torch 2.12 to 2.15). A whole contiguous network would be slower.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu":
            return super().forward(images)
        # Strides tell torch the memory format, also of a 1 x 1 kernel, where both are the same bytes.
        weight = self.weight.flatten(1)[:, :, None, None]
        return F.conv2d(images.contiguous(), weight, self.bias, self.stride)


def build_backbone(config: BackboneConfig) -> Backbone:
    """A ResNet without its classifier: images [B, 3, S, S] -> features [B, D], D in its `feature_dim`.

    At width 1 with the ImageNet stem, tensors have the names and shapes of torchvision's model of the same name.
    """
    block, layers, groups = ARCHITECTURES[config.arch]
    network = Backbone(block, list(layers), **groups)
    channels = [max(1, round(width * config.width_multiplier)) for width in _STAGE_CHANNELS]
    if config.width_multiplier != 1:
        network.inplanes = channels[0]
        network.bn1 = nn.BatchNorm2d(channels[0])
        for stage, (width, depth) in enumerate(zip(channels, layers, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            setattr(network, f"layer{stage}", network._make_layer(block, width, depth, stride=stride))
    network.maxpool = MaxPool()
    if config.stem == "small":
        network.conv1 = nn.Conv2d(3, channels[0], kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif config.width_multiplier != 1:
        network.conv1 = nn.Conv2d(3, channels[0], kernel_size=7, stride=2, padding=3, bias=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (1, 1) and module.in_channels < _SAFE_CHANNELS:
                module.__class__ = NarrowShortcut
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    network.feature_dim = channels[-1] * block.expansion
    network.fc = nn.Identity()
    return network


def loaded_backbone(config: BackboneConfig, tensors: Mapping[str, Tensor]) -> Backbone:
    """`build_backbone` with these tensors, of its names and shapes, as float32 on the CPU; no weights are drawn before.

    Raises RuntimeError if one is missing, left over or of another shape.
    """
    with torch.device("meta"):
        backbone = build_backbone(config)
    backbone.to_empty(device="cpu").load_state_dict(tensors)
    return backbone


class Encoder(nn.Module):
    """Backbone and projection head: images [B, 3, S, S] -> unit vectors [B, projection_dim]."""

    def __init__(self, config: BackboneConfig, projection_dim: int, projection_layers: int = 2) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        dim = self.backbone.feature_dim
        hidden = [nn.Linear(dim, dim), nn.ReLU()] if projection_layers == 2 else []
        self.projection_head = nn.Sequential(*hidden, nn.Linear(dim, projection_dim))

    def forward(self, images: Tensor) -> Tensor:
        return self._projected(self.backbone(images))

    def late(self, features: Tensor) -> Tensor:
        """What follows after `Backbone.early`."""
        return self._projected(self.backbone.late(features))

    def _projected(self, features: Tensor) -> Tensor:
        projection = self.projection_head(features)
        # Half precision would lose the unit length.
        wide = projection.float() if projection.dtype in (torch.float16, torch.bfloat16) else projection
        return F.normalize(wide, dim=1)
