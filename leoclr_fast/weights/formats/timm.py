"""A `.safetensors` that timm's own ResNet loads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.pretrained import Pretrained


class TimmFormat(ExportFormat):
    """Of timm's model of the same name with num_classes=0: tensors have the same names as torchvision's."""

    name = "timm"
    ending = ".safetensors"
    packages = ("timm",)
    tolerance = 1e-5

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        import timm

        network = timm.create_model(config.arch, pretrained=False, num_classes=0)
        timm.models.load_checkpoint(network, str(path), strict=True)
        return network.eval()(images)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        return (
            "import timm\n"
            f'backbone = timm.create_model("{pretrained.description.backbone.arch}", num_classes=0)\n'
            f'timm.models.load_checkpoint(backbone, "{file_name}", strict=True)'
        )
