"""Pretrained weights out of a run, and back into a backbone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load, save
from torch import nn
from torchvision.models.resnet import ResNet

from leoclr_fast.backbone import build_backbone
from leoclr_fast.checkpoint import load_newest_checkpoint
from leoclr_fast.config import RunConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.run_folder import RunFolder, write_atomically

_QUERY_BACKBONE = "query_encoder.backbone."


def save_backbone(path: Path, backbone: nn.Module, config: RunConfig) -> None:
    """The backbone's tensors as safetensors, under torchvision's names; recipe and architecture in the metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    description = {"recipe": config.recipe, **as_plain(config.result.backbone)}
    # One key: safetensors writes several in a random order, and equal runs should leave equal files.
    write_atomically(path, save(tensors, {"leoclr_fast": json.dumps(description)}))


def load_backbone(run: RunFolder, config: RunConfig) -> tuple[ResNet, str]:
    """The backbone of a run, on the CPU, and where it was read from: its final weights, else its newest checkpoint.

    Raises FileNotFoundError if the run has neither, RuntimeError if a tensor is left over or missing.
    """
    backbone = build_backbone(config.result.backbone)
    if run.final_weights.is_file():
        backbone.load_state_dict(load(run.final_weights.read_bytes()))
        return backbone, str(run.final_weights)
    newest = load_newest_checkpoint(run.checkpoints)
    if newest is None:
        raise FileNotFoundError(f"{run.path} has neither final weights nor a checkpoint yet")
    path, state = newest
    tensors = {
        name.removeprefix(_QUERY_BACKBONE): tensor
        for name, tensor in state["method"].items()
        if name.startswith(_QUERY_BACKBONE)
    }
    backbone.load_state_dict(tensors)
    return backbone, str(path)
