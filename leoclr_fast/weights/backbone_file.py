"""Our file of weights: a backbone as safetensors, under torchvision's names, with a description of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from dataset_tools.files import write_file
from dataset_tools.schema import decode_json
from leoclr_fast.config import BackboneConfig, RunConfig
from leoclr_fast.config_file import as_plain, from_plain
from leoclr_fast.weights.architecture import recognised_backbone, require_exact
from pipelines.config import ViewConfig

_METADATA_KEY = "leoclr_fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a file of weights says about itself."""

    recipe: str
    """The recipe it was trained by, or how it came here."""
    backbone: BackboneConfig
    views: ViewConfig = field(default_factory=ViewConfig)
    """Image size and normalisation that the backbone is used to, among others."""
    source: str = ""
    """Where an imported file came from."""


def save_backbone(path: Path, backbone: nn.Module, config: RunConfig) -> None:
    """Write the backbone of a run to `path`, whole or not at all."""
    description = Description(recipe=config.recipe, backbone=config.result.backbone, views=config.result.views)
    write_file(path, backbone_bytes(backbone.state_dict(), description))


def backbone_bytes(tensors: Mapping[str, Tensor], description: Description) -> bytes:
    """The content of a file of weights; equal tensors and descriptions give equal bytes."""
    # One key: safetensors writes several in a random order, and equal runs should leave equal files.
    document = {
        "recipe": description.recipe,
        **as_plain(description.backbone),
        "views": as_plain(description.views),
        **({"source": description.source} if description.source else {}),
    }
    return tensor_bytes(tensors, {_METADATA_KEY: json.dumps(document)})


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file, the same for tensors in any order."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, metadata)


def read_backbone_file(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Tensors and description of a file that `save_backbone`, `import-moco` or `export --to safetensors` wrote.

    A safetensors file without our description is recognised by its shapes, and taken to be normalised as ImageNet.
    Raises FileNotFoundError; ValueError if it is no such file, or a tensor is left over, missing, misshapen or NaN.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}; give a run folder or a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}. Give a run folder or a .safetensors file; "
            "`leoclr-fast import-moco` makes one of a MoCo .pth.tar"
        ) from error
    if _METADATA_KEY not in metadata:
        return tensors, Description(recipe="unknown", backbone=recognised_backbone(tensors, str(path)))
    description = _description(metadata[_METADATA_KEY], str(path))
    require_exact(tensors, description.backbone, str(path))
    return tensors, description


def require_new_file(out: Path, ending: str) -> None:
    """Raises ValueError if `out` has another ending, exists, or its folder does not."""
    if out.suffix != ending:
        raise ValueError(f"--out {out} does not end in {ending}, the format that is written; rename it")
    if out.exists():
        raise ValueError(f"--out {out} exists already and is not overwritten; give another name")
    if not out.parent.is_dir():
        raise ValueError(f"the folder of --out {out} does not exist; make it first")


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values: the same for the same weights in whatever file, in any order."""
    return hashlib.sha256(tensor_bytes(tensors)).hexdigest()


def _description(text: str, origin: str) -> Description:
    """Raises ValueError if the description cannot be understood."""
    try:
        backbone = decode_json(text, dict[str, Any], "it")
        others = {name: backbone.pop(name) for name in ("recipe", "views", "source") if name in backbone}
        return from_plain(Description, {**others, "backbone": backbone}, "it")
    except ValueError as error:
        raise ValueError(f"{origin} has a description that this version cannot read: {error}") from error
