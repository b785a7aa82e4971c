"""A MoCo checkpoint as a file of weights that every evaluator takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.run.folder import write_atomically
from leoclr_fast.weights.backbone_file import Description, backbone_bytes, weights_sha256
from leoclr_fast.weights.moco_checkpoint import read_moco_checkpoint
from leoclr_fast.weights.new_file import require_new_file


def import_moco(checkpoint: Path, out: Path, arch: str | None = None) -> dict[str, Any]:
    """Write the query encoder's backbone of `checkpoint` to `out`, a .safetensors file.

    Returns out, arch, stem, width_multiplier, feature_dim, parameters, tensors (of the backbone), head,
    head_tensors_left_behind, other_tensors_left_behind (of key encoder and queue), epoch, source_sha256,
    weights_sha256. Raises ValueError as `read_moco_checkpoint`, or if `out` has another ending or exists.
    """
    require_new_file(out, ".safetensors")
    moco = read_moco_checkpoint(checkpoint, arch)
    backbone = build_backbone(moco.config)
    backbone.load_state_dict(moco.backbone)
    tensors = {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in moco.backbone.items()
    }
    after = "" if moco.epoch is None else f" after epoch {moco.epoch}"
    description = Description(
        recipe="import-moco",
        backbone=moco.config,
        source=f"{checkpoint.name}{after}, sha256 {moco.file_sha256}; projection head of {moco.head}",
    )
    write_atomically(out, backbone_bytes(tensors, description))
    return {
        "out": str(out),
        "arch": moco.config.arch,
        "stem": moco.config.stem,
        "width_multiplier": moco.config.width_multiplier,
        "feature_dim": backbone.feature_dim,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "tensors": len(tensors),
        "head": moco.head,
        "head_tensors_left_behind": moco.num_head_tensors,
        "other_tensors_left_behind": moco.num_other_tensors,
        "epoch": moco.epoch,
        "source_sha256": moco.file_sha256,
        "weights_sha256": weights_sha256(tensors),
    }
