"""A `.safetensors` that timm's own ResNet loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from leoclr_fast.config import BackboneConfig
from leoclr_fast.run.folder import write_atomically
from leoclr_fast.weights.backbone_file import backbone_bytes
from leoclr_fast.weights.formats.export_format import ExportFormat, only_published_networks
from leoclr_fast.weights.pretrained import Pretrained


class TimmFormat(ExportFormat):
    """Of timm's resnet18, resnet34 and resnet50 with num_classes=0: tensors have the same names as torchvision's."""

    name = "timm"
    ending = ".safetensors"
    packages = ("timm",)
    tolerance = 1e-5

    def refusal(self, config: BackboneConfig) -> str | None:
        return only_published_networks(config, "timm")

    def write(self, path: Path, pretrained: Pretrained) -> None:
        write_atomically(path, backbone_bytes(pretrained.backbone.state_dict(), pretrained.description))

    @torch.no_grad()
    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        import timm

        network = timm.create_model(config.arch, pretrained=False, num_classes=0)
        timm.models.load_checkpoint(network, str(path), strict=True)
        return network.eval()(images)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        arch = pretrained.description.backbone.arch
        return (
            "import timm\n"
            f'backbone = timm.create_model("{arch}", num_classes=0)\n'
            f'timm.models.load_checkpoint(backbone, "{file_name}", strict=True)'
        )
