"""Strict accounting: a set of tensors is exactly one of our backbones, or it is refused with all that does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from dataset_tools.sources.layout import first_few
from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import ARCHITECTURES, build_backbone

_BLOCK_NAME = re.compile(r"layer[1-4]\.\d+\.")


def recognised_backbone(tensors: Mapping[str, Tensor], origin: str) -> BackboneConfig:
    """The backbone that the tensors, under torchvision's names, are exactly.

    Raises ValueError, saying of the nearest backbone what is missing, left over or of another shape.
    """
    blocks = {match[0] for match in map(_BLOCK_NAME.match, tensors) if match}
    if not blocks:
        raise ValueError(
            f"{origin} holds no backbone: it has {len(tensors)} tensors ({first_few(sorted(tensors))}), none of them "
            "of a ResNet's stages. A projection head alone cannot be evaluated or exported; give the whole encoder's "
            "weights"
        )
    of_this_depth = [name for name, (_, layers, _) in ARCHITECTURES.items() if sum(layers) == len(blocks)]
    candidates = [
        BackboneConfig(arch=name, stem=stem, width_multiplier=width)
        for width in sorted({1.0, _width_multiplier(tensors)})
        for name in of_this_depth or ARCHITECTURES
        for stem in ("imagenet", "small")
    ]
    nearest = min(candidates, key=lambda config: sum(map(len, _misfits(tensors, config).values())))
    require_exact(tensors, nearest, origin)
    return nearest


def require_exact(tensors: Mapping[str, Tensor], config: BackboneConfig, origin: str) -> None:
    """Raises ValueError unless the tensors are all of this backbone's, of its shapes and finite, and no others.

    Any float dtype is as good as another.
    """
    problems = _misfits(tensors, config)
    if not any(problems.values()):  # values are looked at only where names and shapes agree
        not_finite = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        problems = {"with NaN or infinite values": not_finite}
    if any(problems.values()):
        stem = "" if config.stem == "imagenet" else " with the small stem"
        width = "" if config.width_multiplier == 1 else f" of width {config.width_multiplier:g}"
        account = "; ".join(f"{title}: {first_few(lines)}" for title, lines in problems.items() if lines)
        raise ValueError(
            f"{origin} does not hold exactly a {config.arch}{stem}{width}: {account}. Nothing is loaded in part; "
            f"backbones known here are {', '.join(ARCHITECTURES)}, of any width, with the ImageNet or the small stem"
        )


@cache
def layout_of(config: BackboneConfig) -> Mapping[str, Tensor]:
    """Name -> tensor of this backbone on the meta device: shapes and dtypes without values."""
    with torch.device("meta"):
        return build_backbone(config).state_dict()


def _misfits(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, list[str]]:
    """What is wrong → a line for each tensor that another network would fit better."""
    network = layout_of(config)
    common = [(name, tensors[name], wanted) for name, wanted in network.items() if name in tensors]
    return {
        "missing": [f"{name} {list(wanted.shape)}" for name, wanted in network.items() if name not in tensors],
        "left over": [f"{name} {list(tensors[name].shape)}" for name in sorted(tensors.keys() - network)],
        "of another shape": [
            f"{name} {list(there.shape)} where {list(wanted.shape)} is needed"
            for name, there, wanted in common
            if there.shape != wanted.shape
        ],
        "of another kind of number": [
            name for name, there, wanted in common if there.is_floating_point() != wanted.is_floating_point()
        ],
    }


def _width_multiplier(tensors: Mapping[str, Tensor]) -> float:
    """Of the widest stage, so that rounding matters least."""
    widest = tensors.get("layer4.0.bn1.weight")
    return len(widest) / 512 if widest is not None and widest.ndim == 1 and len(widest) else 1.0
