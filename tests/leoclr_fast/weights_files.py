"""Encoders with values as after training, and the files that others make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import Backbone, build_backbone
from leoclr_fast.weights.backbone_file import Description, backbone_bytes
from pipelines.config import ViewConfig


def drawn_backbone(config: BackboneConfig, seed: int = 0) -> Backbone:
    """A backbone before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(config)


def write_weights(path: Path, network: nn.Module, config: BackboneConfig, image_size: int = 64) -> Path:
    """A file of weights out of a network with or without a classifier."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    description = Description(recipe="somehow", backbone=config, views=ViewConfig(image_size=image_size))
    path.write_bytes(backbone_bytes(tensors, description))
    return path


def lively_resnet(arch: str, num_classes: int = 128, **options: Any) -> models.ResNet:
    """torchvision's network, random, with running statistics and scales that are not the initial 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = models.get_model(arch, weights=None, num_classes=num_classes, **options)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.2)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                module.num_batches_tracked.fill_(1234)
    return network


def moco_state(network: models.ResNet, version: int) -> dict[str, Tensor]:
    """The state dict that facebookresearch/moco saves: DistributedDataParallel's prefix, both encoders, the queue."""
    state = dict(network.state_dict())
    if version == 2:
        weight, bias = state.pop("fc.weight"), state.pop("fc.bias")
        dim = weight.shape[1]
        state |= {"fc.0.weight": torch.randn(dim, dim), "fc.0.bias": torch.randn(dim)}
        state |= {"fc.2.weight": weight, "fc.2.bias": bias}
    saved = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    saved |= {f"module.encoder_k.{name}": tensor.clone() for name, tensor in state.items()}
    return saved | {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}


def narrow_moco_state() -> dict[str, Tensor]:
    """A MoCo-v2 state dict of a ResNet-18 of an eighth of the width: small and quick."""
    network = build_backbone(BackboneConfig(arch="resnet18", width_multiplier=0.125))
    network.fc = nn.Linear(network.feature_dim, 16)
    return moco_state(network, 2)


def write_moco(path: Path, state: dict[str, Tensor], arch: str = "resnet18", *, zipped: bool = True) -> Path:
    """zipped: as PyTorch has saved since 1.6; MoCo's published files are older."""
    document = {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(document, path, _use_new_zipfile_serialization=zipped)
    return path
