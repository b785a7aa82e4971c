"""Export: write weights in another library's format, load them back with that library, compare, and keep the file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dataset_tools.files import write_file
from dataset_tools.versions import installed_version
from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.backbone_file import require_new_file
from leoclr_fast.weights.formats import FORMATS, ExportFormat
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained


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
