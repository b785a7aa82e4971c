"""What every export format has. Legend: N images of S pixels, D features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dataset_tools.files import write_file
from dataset_tools.versions import installed_version
from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.backbone_file import backbone_bytes
from leoclr_fast.weights.pretrained import Pretrained


class ExportFormat(ABC):
    """A file of weights for one library, and that library as its reader."""

    name: ClassVar[str]
    ending: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    """Distributions that write it and load it back; the last one computes the features."""
    tolerance: ClassVar[float]
    """Largest allowed difference between its features and ours, over the largest of ours."""
    any_backbone: ClassVar[bool] = False
    """Whether it holds any stem and width; else only the ResNets that the library itself builds."""

    def content(self, pretrained: Pretrained) -> bytes:
        """Of the file; by default our own safetensors, whose tensors have torchvision's names."""
        return backbone_bytes(pretrained.backbone.state_dict(), pretrained.description)

    def write(self, path: Path, pretrained: Pretrained) -> None:
        """Write the file. Raises OSError if that fails."""
        write_file(path, self.content(pretrained))

    @abstractmethod
    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        """Load the file back, strictly, and compute features without gradients: float32 [N, 3, S, S] -> [N, D]."""

    @abstractmethod
    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        """The lines of code that load the file."""

    @property
    def reader(self) -> str:
        """Who loads the file back: `timm 1.0.31`."""
        return f"{self.packages[-1]} {installed_version(self.packages[-1])}"

    def missing_packages(self) -> list[str]:
        """Of `packages`, those that are not installed."""
        return [package for package in self.packages if installed_version(package) is None]

    def refusal(self, config: BackboneConfig) -> str | None:
        """Why the format cannot hold this backbone, or None if it can."""
        reasons = []
        if config.stem != "imagenet":
            reasons.append("a 7x7 stem with max-pooling, this backbone the small 3x3 stem")
        if config.width_multiplier != 1:
            reasons.append(f"width 1, this backbone width {config.width_multiplier:g}")
        if self.any_backbone or not reasons:
            return None
        return f"{self.name}'s {config.arch} has {', and '.join(reasons)}, so it could not load the file"
