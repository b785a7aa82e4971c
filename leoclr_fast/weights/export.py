"""Export: write weights in another library's format, load them back with that library, compare, and keep the file.

Legend: N images of S pixels, D features.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision import models

from dataset_tools.files import write_file
from dataset_tools.versions import installed_version
from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import loaded_backbone
from leoclr_fast.weights.architecture import layout_of
from leoclr_fast.weights.backbone_file import backbone_bytes, require_new_file
from leoclr_fast.weights.detectron2 import detectron2_bytes, read_detectron2
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained


class ExportFormat(ABC):
    """A file of weights for one library, and that library as its reader."""

    ending: ClassVar[str] = ".safetensors"
    package: ClassVar[str]
    """What loads it back."""
    tolerance: ClassVar[float] = 1e-5
    """Largest allowed difference between its features and ours, over the largest of ours."""
    any_backbone: ClassVar[bool] = False
    """Whether it holds any stem and width; else only the ResNets that the library itself builds."""
    code: ClassVar[str]
    """The lines that load {file}, a network of the architecture {arch}."""

    def content(self, pretrained: Pretrained) -> bytes:
        """Of the file; by default our own safetensors, whose tensors have torchvision's names."""
        return backbone_bytes(pretrained.backbone.state_dict(), pretrained.description)

    @abstractmethod
    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        """Load the file back, strictly, and compute features without gradients: float32 [N, 3, S, S] -> [N, D]."""

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        """The lines that load the file."""
        return self.code.format(file=file_name, arch=pretrained.description.backbone.arch)

    @property
    def reader(self) -> str:
        """Who loads the file back: `timm 1.0.31`."""
        return f"{self.package} {installed_version(self.package)}"


class TorchvisionFormat(ExportFormat):
    """The state dict of torchvision's model of the same name, without the classifier."""

    ending = ".pth"
    package = "torchvision"
    code = (
        "import torch, torchvision\n"
        "backbone = torchvision.models.{arch}(weights=None)\n"
        "backbone.fc = torch.nn.Identity()  # the file has no classifier; without this line it stays random\n"
        'backbone.load_state_dict(torch.load("{file}", weights_only=True))'
    )

    def content(self, pretrained: Pretrained) -> bytes:
        buffer = io.BytesIO()
        torch.save(dict(pretrained.backbone.state_dict()), buffer)
        return buffer.getvalue()

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        network = models.get_model(config.arch, weights=None)
        network.fc = nn.Identity()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()(images)


class TimmFormat(ExportFormat):
    """Of timm's model of the same name with num_classes=0: tensors have the same names as torchvision's."""

    package = "timm"
    code = (
        "import timm\n"
        'backbone = timm.create_model("{arch}", num_classes=0)\n'
        'timm.models.load_checkpoint(backbone, "{file}", strict=True)'
    )

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        import timm

        network = timm.create_model(config.arch, pretrained=False, num_classes=0)
        timm.models.load_checkpoint(network, str(path), strict=True)
        return network.eval()(images)


class SafetensorsFormat(ExportFormat):
    """Our own file of weights: what a run leaves as final.safetensors, and every evaluator takes."""

    package = "safetensors"
    tolerance = 0.0
    any_backbone = True
    code = (
        "from pathlib import Path\n"
        "from leoclr_fast.weights.pretrained import load_pretrained\n"
        'backbone = load_pretrained(Path("{file}")).backbone'
    )

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        return load_pretrained(path).backbone.eval()(images)


class Detectron2Format(ExportFormat):
    """Of detectron2's ResNets with STRIDE_IN_1X1 False; `matching_heuristics` let them find their place."""

    ending = ".pkl"
    package = "numpy"
    tolerance = 0.0
    reader = "our own strict reader (detectron2 itself was not run)"

    def content(self, pretrained: Pretrained) -> bytes:
        return detectron2_bytes(pretrained.backbone.state_dict())

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        return loaded_backbone(config, read_detectron2(path, list(layout_of(config)))).eval()(images)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        views, config = pretrained.description.views, pretrained.description.backbone
        mean, std = (", ".join(f"{255 * value:.3f}" for value in values) for values in (views.mean, views.std))
        depth, network = re.findall(r"\d+", config.arch)[0], pretrained.backbone
        blocks = "\n    RES2_OUT_CHANNELS: 64" if int(depth) < 50 else ""
        if (network.groups, network.base_width) != (1, 64):
            blocks += f"\n    NUM_GROUPS: {network.groups}\n    WIDTH_PER_GROUP: {network.base_width}"
        return (
            f"MODEL:\n  WEIGHTS: {file_name}\n  PIXEL_MEAN: [{mean}]\n  PIXEL_STD: [{std}]\n  RESNETS:\n"
            f"    DEPTH: {depth}\n    STRIDE_IN_1X1: False{blocks}\n"
            "INPUT:\n  FORMAT: RGB"
        )


FORMATS: dict[str, ExportFormat] = {
    "torchvision": TorchvisionFormat(),
    "timm": TimmFormat(),
    "safetensors": SafetensorsFormat(),
    "detectron2": Detectron2Format(),
}


def export(weights: Path, to: str, out: Path) -> dict[str, Any]:
    """Write the backbone of RUN|WEIGHTS to `out` for the library `to`, one of `FORMATS`.

    Returns out, usage (the lines that load it), to, difference (of the features of fixed images, over the largest
    feature), tolerance, reader, sha256 (of the file), weights, weights_sha256.
    Raises ValueError for a backbone that the format cannot hold, a package that is missing, or an `out` that exists or
    has another ending; RuntimeError if the file does not give the same features. Then nothing is left behind.
    """
    exporter = FORMATS[to]
    require_new_file(out, exporter.ending)
    if installed_version(exporter.package) is None:
        raise ValueError(f"--to {to} needs {exporter.package}; install it with: pip install 'leoclr-fast[export]'")
    pretrained = load_pretrained(weights)
    config = pretrained.description.backbone
    if not exporter.any_backbone and config != BackboneConfig(arch=config.arch):
        raise ValueError(
            f"{weights} cannot be exported to {to}: {to}'s {config.arch} has a 7x7 stem and width 1, this backbone "
            f"the {config.stem} stem and width {config.width_multiplier:g}; safetensors holds any backbone"
        )
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}.", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        write_file(temporary, exporter.content(pretrained))
        difference = _difference(exporter, temporary, pretrained)
        content_sha256 = hashlib.sha256(temporary.read_bytes()).hexdigest()
        os.replace(temporary, out)
    return {
        "out": str(out),
        "usage": exporter.usage(out.name, pretrained),
        "to": to,
        "difference": difference,
        "tolerance": exporter.tolerance,
        "reader": exporter.reader,
        "sha256": content_sha256,
        "weights": str(pretrained.path),
        "weights_sha256": pretrained.sha256,
    }


@torch.no_grad()
def _difference(exporter: ExportFormat, path: Path, pretrained: Pretrained) -> float:
    """Of the features of noise images. Raises RuntimeError if they differ by more than the format's tolerance."""
    side = pretrained.description.views.image_size
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = pretrained.backbone.eval()(images)
    theirs = exporter.features(path, pretrained.description.backbone, images)
    scale = float(ours.abs().max())
    difference = float((ours - theirs).abs().max()) / scale if scale > 0 else 0.0
    if ours.shape != theirs.shape or not difference <= exporter.tolerance:
        raise RuntimeError(
            f"the exported file does not give the same features: loaded back by {exporter.reader} they differ by "
            f"{difference:.1e} of the largest, allowed are {exporter.tolerance:.0e}; nothing was kept"
        )
    return difference
