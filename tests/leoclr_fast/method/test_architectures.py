"""Every architecture is torchvision's of the same name."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from leoclr_fast.config import Architecture, BackboneConfig
from leoclr_fast.method.backbone import ARCHITECTURES, build_backbone
from leoclr_fast.weights.architecture import recognised_backbone


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_and_shapes_are_torchvisions(arch: Architecture) -> None:
    with torch.device("meta"):
        ours = build_backbone(BackboneConfig(arch=arch))
        theirs = models.get_model(arch, weights=None)
    assert ours.feature_dim == theirs.fc.in_features
    theirs.fc = torch.nn.Identity()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert (ours.groups, ours.base_width) == (theirs.groups, theirs.base_width)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_features_are_torchvisions(arch: Architecture) -> None:
    theirs, ours = models.get_model(arch, weights=None).double(), build_backbone(BackboneConfig(arch=arch)).double()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    assert recognised_backbone(theirs.state_dict(), "these") == BackboneConfig(arch=arch)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images.contiguous()))
