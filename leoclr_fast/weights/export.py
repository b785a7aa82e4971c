"""Export: write weights in another library's format, load them back with that library, compare, and keep the file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leoclr_fast.weights.backbone_file import require_new_file
from leoclr_fast.weights.formats.detectron2 import Detectron2Format
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.formats.safetensors import SafetensorsFormat
from leoclr_fast.weights.formats.timm import TimmFormat
from leoclr_fast.weights.formats.torchvision import TorchvisionFormat
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained

FORMATS: dict[str, ExportFormat] = {
    exporter.name: exporter for exporter in (TorchvisionFormat(), TimmFormat(), SafetensorsFormat(), Detectron2Format())
}
_NUM_IMAGES = 4


def export(weights: Path, to: str, out: Path) -> dict[str, Any]:
    """Write the backbone of RUN|WEIGHTS to `out` for the library `to`.

    Returns out, usage (the lines that load it), to, difference (of the features of fixed images, over the largest
    feature), tolerance, reader, sha256 (of the file), weights, weights_sha256.
    Raises ValueError for an unknown format, a backbone that the format cannot hold, a package that is missing, or an
    `out` that exists or has another ending; RuntimeError if the file does not give the same features. Then nothing is
    left behind.
    """
    if to not in FORMATS:
        raise ValueError(f"there is no export format {to!r}; allowed: {', '.join(FORMATS)}")
    exporter = FORMATS[to]
    require_new_file(out, exporter.ending)
    missing = exporter.missing_packages()
    if missing:
        raise ValueError(f"--to {to} needs {', '.join(missing)}; install them with: pip install 'leoclr-fast[export]'")
    pretrained = load_pretrained(weights)
    refusal = exporter.refusal(pretrained.description.backbone)
    if refusal is not None:
        raise ValueError(f"{weights} cannot be exported to {to}: {refusal}; safetensors holds any backbone")
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}.", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        exporter.write(temporary, pretrained)
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


def fixed_images(image_size: int) -> Tensor:
    """The images that exports are compared on: float32 [4, 3, S, S], normal noise, the same every time."""
    return torch.randn(_NUM_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _difference(exporter: ExportFormat, path: Path, pretrained: Pretrained) -> float:
    """Raises RuntimeError if the features differ by more than the format's tolerance."""
    images = fixed_images(pretrained.description.views.image_size)
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
