"""MoCo's checkpoints (`.pth.tar` of facebookresearch/moco, versions 1 and 2): read without running anything, and made
files of weights that every evaluator takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset_tools.files import write_file
from dataset_tools.sources.layout import first_few
from leoclr_fast.method.backbone import loaded_backbone
from leoclr_fast.run.tensors import load_tensors
from leoclr_fast.weights.architecture import recognised_backbone
from leoclr_fast.weights.backbone_file import Description, backbone_bytes, require_new_file, weights_sha256

_QUERY, _KEY = "encoder_q.", "encoder_k."
_HEADS = {
    ("fc.bias", "fc.weight"): "one layer, as MoCo-v1's",
    ("fc.0.bias", "fc.0.weight", "fc.2.bias", "fc.2.weight"): "two layers, as MoCo-v2's",
}


def import_moco(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the query encoder's backbone of `checkpoint`, in which every tensor is accounted for, to `out`, a
    .safetensors file. It is read with `weights_only=True`: nothing in it is executed.

    Returns out, arch, stem, width_multiplier, feature_dim, parameters, tensors (of the backbone), head,
    head_tensors_left_behind, other_tensors_left_behind (of key encoder and queue), epoch, source_sha256,
    weights_sha256. Raises FileNotFoundError; ValueError if it is another kind of file, if a tensor is left over,
    missing, of another shape or not finite, or if `out` has another ending or exists.
    """
    require_new_file(out, ".safetensors")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}; give a MoCo .pth.tar")
    content = checkpoint.read_bytes()
    state, epoch = _read(content, checkpoint)
    query = {name.removeprefix(_QUERY): tensor for name, tensor in state.items() if name.startswith(_QUERY)}
    others = {name: tensor for name, tensor in state.items() if not name.startswith(_QUERY)}
    if not query:
        raise ValueError(
            f"{checkpoint} has no query encoder: none of its {len(state)} tensors ({first_few(state)}) is named "
            "module.encoder_q.…; give a checkpoint of MoCo's main_moco.py"
        )
    tensors = {name: tensor for name, tensor in query.items() if not name.startswith("fc.")}
    head = {name: tensor for name, tensor in query.items() if name.startswith("fc.")}
    config = recognised_backbone(tensors, f"the query encoder in {checkpoint}")
    if tuple(sorted(head)) not in _HEADS:
        raise ValueError(
            f"the projection head in {checkpoint} is neither MoCo-v1's (fc.weight, fc.bias) nor MoCo-v2's "
            f"(fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias): it has {_listed(head) or 'nothing'}"
        )
    _require_known_others(others, query, checkpoint)
    backbone = loaded_backbone(config, tensors)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    after = "" if epoch is None else f" after epoch {epoch}"
    file_sha256, head_title = hashlib.sha256(content).hexdigest(), _HEADS[tuple(sorted(head))]
    source = f"{checkpoint.name}{after}, sha256 {file_sha256}; projection head of {head_title}"
    write_file(out, backbone_bytes(tensors, Description(recipe="import-moco", backbone=config, source=source)))
    return {
        "out": str(out),
        "arch": config.arch,
        "stem": config.stem,
        "width_multiplier": config.width_multiplier,
        "feature_dim": backbone.feature_dim,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "tensors": len(tensors),
        "head": head_title,
        "head_tensors_left_behind": len(head),
        "other_tensors_left_behind": len(others),
        "epoch": epoch,
        "source_sha256": file_sha256,
        "weights_sha256": weights_sha256(tensors),
    }


def _read(content: bytes, path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors without the prefix of DistributedDataParallel, and the epoch."""
    document = load_tensors(content, str(path))
    if not isinstance(document, Mapping) or not isinstance(document.get("state_dict"), Mapping):
        what = f"a {type(document).__name__}"
        if isinstance(document, Mapping):
            what += f" with {first_few([str(key) for key in document]) or 'nothing in it'}"
        raise ValueError(f"{path} is no MoCo checkpoint: it holds {what}, not a dict with a state_dict")
    state = {}
    for name, tensor in document["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} is no MoCo checkpoint: {name!r} in its state_dict is no plain tensor")
        state[name.removeprefix("module.")] = tensor
    if len(state) != len(document["state_dict"]):
        raise ValueError(f"{path} holds tensors twice: with and without the prefix module.")
    epoch = document.get("epoch")
    return state, epoch if isinstance(epoch, int) else None


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return first_few([f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()])


def _require_known_others(others: Mapping[str, Tensor], query: Mapping[str, Tensor], path: Path) -> None:
    """The key encoder mirrors the query encoder, whole or not at all; besides there are only queue and queue_ptr."""
    key = {name.removeprefix(_KEY): tensor.shape for name, tensor in others.items() if name.startswith(_KEY)}
    expected = {name: tensor.shape for name, tensor in query.items()}
    if key and key != expected:
        differing = sorted(name for name in key.keys() | expected.keys() if key.get(name) != expected.get(name))
        raise ValueError(
            f"the key encoder in {path} does not mirror the query encoder: missing, left over or of another shape are "
            f"{first_few(differing)}"
        )
    known = ("queue", "queue_ptr")
    unknown = {name: tensor for name, tensor in others.items() if not name.startswith(_KEY) and name not in known}
    if unknown:
        raise ValueError(
            f"{path} has {len(unknown)} tensors left over that belong to no MoCo checkpoint: {_listed(unknown)}. Known "
            "are encoder_q, encoder_k, queue and queue_ptr"
        )
