"""A `.pth` with the state dict that torchvision's own ResNet loads."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.pretrained import Pretrained


class TorchvisionFormat(ExportFormat):
    """Of torchvision's model of the same name, without the classifier."""

    name = "torchvision"
    ending = ".pth"
    packages = ("torchvision",)
    tolerance = 1e-5

    def content(self, pretrained: Pretrained) -> bytes:
        buffer = io.BytesIO()
        torch.save(dict(pretrained.backbone.state_dict()), buffer)
        return buffer.getvalue()

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        network = models.get_model(config.arch, weights=None)
        network.fc = nn.Identity()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()(images)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        return (
            "import torch, torchvision\n"
            f"backbone = torchvision.models.{pretrained.description.backbone.arch}(weights=None)\n"
            "backbone.fc = torch.nn.Identity()  # the file has no classifier; without this line it stays random\n"
            f'backbone.load_state_dict(torch.load("{file_name}", weights_only=True))'
        )
