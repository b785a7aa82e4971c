"""Which backbone a set of tensors is, by names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.weights.accounting import Account, take_account

_BACKBONE_NAME = re.compile(r"(conv1|bn1|layer[1-4])\.")
_STAGE_CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
ARCHITECTURES: tuple[str, ...] = get_args(get_type_hints(BackboneConfig)["arch"])


def network_tensors(config: BackboneConfig) -> dict[str, Tensor]:
    """Names and shapes of a backbone's parameters and buffers, on the meta device."""
    with torch.device("meta"):
        return dict(build_backbone(config).state_dict())


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
    candidates = [
        BackboneConfig(arch=name, stem=stem, width_multiplier=width)  # type: ignore[arg-type]
        for width in sorted({1.0, _width_multiplier(tensors)})
        for name in ((arch,) if arch else ARCHITECTURES)
        for stem in ("imagenet", "small")
    ]
    accounts = [(take_account(tensors, network_tensors(config)), config) for config in candidates]
    account, nearest = min(accounts, key=lambda pair: pair[0].num_misfits)
    require_exact(account, nearest, origin)
    return nearest


def require_exact(account: Account, config: BackboneConfig, origin: str) -> None:
    """Raises ValueError with the account unless all of it adds up."""
    if account.num_problems:
        stem = "" if config.stem == "imagenet" else " with the small stem"
        width = "" if config.width_multiplier == 1 else f" of width {config.width_multiplier:g}"
        raise ValueError(
            f"{origin} does not hold exactly a {config.arch}{stem}{width}: {account}. Nothing is loaded in part; "
            f"backbones known here are {', '.join(ARCHITECTURES)}, of any width, with the ImageNet or the small stem"
        )


def _width_multiplier(tensors: Mapping[str, Tensor]) -> float:
    """Of the widest stage that names it, so that rounding matters least."""
    for stage, channels in reversed(_STAGE_CHANNELS.items()):
        weight = tensors.get(f"{stage}.0.bn1.weight")
        if weight is not None and weight.ndim == 1 and len(weight):
            return len(weight) / channels
    return 1.0
