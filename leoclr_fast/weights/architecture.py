"""Strict accounting: a set of tensors is exactly one of our backbones, or it is refused with all that does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from leoclr_fast.config import Architecture, BackboneConfig
from leoclr_fast.method.backbone import ARCHITECTURES, build_backbone

_BACKBONE_NAME = re.compile(r"(conv1|bn1|layer[1-4])\.")
_STAGE_CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
_MAX_LISTED = 12


def recognised_backbone(tensors: Mapping[str, Tensor], origin: str, arch: str | None = None) -> BackboneConfig:
    """The backbone that the tensors, under torchvision's names, are exactly.

    arch: the architecture it must be; if not given, the one that fits.
    Raises ValueError, saying of the nearest backbone what is missing, left over or of another shape.
    """
    if arch is not None and arch not in ARCHITECTURES:
        raise ValueError(f"there is no architecture {arch!r}; allowed: {', '.join(ARCHITECTURES)}")
    if not any(_BACKBONE_NAME.match(name) for name in tensors):
        names = ", ".join(sorted(tensors)[:4])
        raise ValueError(
            f"{origin} holds no backbone: it has {len(tensors)} tensors ({names}…), none of them of a ResNet's stem or "
            "stages. A projection head alone cannot be evaluated or exported; give the whole encoder's weights"
        )
    possible = [name for name in ARCHITECTURES if name == arch] or _of_this_depth(tensors) or list(ARCHITECTURES)
    candidates = [
        BackboneConfig(arch=name, stem=stem, width_multiplier=width)
        for width in sorted({1.0, _width_multiplier(tensors)})
        for name in possible
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
        account = "; ".join(f"{title}: {_listed(lines)}" for title, lines in problems.items() if lines)
        raise ValueError(
            f"{origin} does not hold exactly a {config.arch}{stem}{width}: {account}. Nothing is loaded in part; "
            f"backbones known here are {', '.join(ARCHITECTURES)}, of any width, with the ImageNet or the small stem"
        )


def _misfits(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, list[str]]:
    """What is wrong → a line for each tensor that another network would fit better."""
    with torch.device("meta"):
        network = build_backbone(config).state_dict()
    left_over = [f"{name} {list(tensors[name].shape)}" for name in sorted(tensors.keys() - network)]
    missing, other_shape, other_kind = [], [], []
    for name, wanted in network.items():
        there = tensors.get(name)
        if there is None:
            missing.append(f"{name} {list(wanted.shape)}")
        elif there.shape != wanted.shape:
            other_shape.append(f"{name} {list(there.shape)} where {list(wanted.shape)} is needed")
        elif there.is_floating_point() != wanted.is_floating_point():
            other_kind.append(name)
    return {
        "missing": missing,
        "left over": left_over,
        "of another shape": other_shape,
        "of another kind of number": other_kind,
    }


def _of_this_depth(tensors: Mapping[str, Tensor]) -> list[Architecture]:
    """The architectures with as many blocks in each stage, of the same kind."""
    blocks = {match[0] for match in map(re.compile(r"layer\d\.\d+").match, tensors) if match}
    depths = tuple(sum(name.startswith(stage) for name in blocks) for stage in _STAGE_CHANNELS)
    return [
        name
        for name, (block, layers, _) in ARCHITECTURES.items()
        if layers == depths and (block is Bottleneck) == ("layer1.0.conv3.weight" in tensors)
    ]


def _width_multiplier(tensors: Mapping[str, Tensor]) -> float:
    """Of the widest stage that names it, so that rounding matters least."""
    for stage, channels in reversed(_STAGE_CHANNELS.items()):
        weight = tensors.get(f"{stage}.0.bn1.weight")
        if weight is not None and weight.ndim == 1 and len(weight):
            return len(weight) / channels
    return 1.0


def _listed(lines: list[str]) -> str:
    more = f" and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    return ", ".join(lines[:_MAX_LISTED]) + more
