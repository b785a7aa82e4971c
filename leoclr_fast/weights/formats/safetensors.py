"""Our own file of weights: any backbone of ours, described in the file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained


class SafetensorsFormat(ExportFormat):
    """What a run leaves as final.safetensors, and every evaluator takes."""

    name = "safetensors"
    ending = ".safetensors"
    packages = ("safetensors",)
    tolerance = 0.0
    any_backbone = True

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        return load_pretrained(path).backbone.eval()(images)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        return (
            "from pathlib import Path\n"
            "from leoclr_fast.weights.pretrained import load_pretrained\n"
            f'backbone = load_pretrained(Path("{file_name}")).backbone'
        )
