"""Accuracies of class scores. Legend: N images, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """In percent."""

    top1: float
    top5: float
    """top-C where there are C < 5 classes."""
    mean_per_class: float
    """The mean over the classes of their top-1; classes without an image do not count."""


def accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Of scores [N, C] against labels, int64 [N]; of several equal scores any may come first, -inf is no prediction."""
    num_classes = scores.shape[1]
    best, ranked = (values.cpu() for values in scores.topk(min(5, num_classes), dim=1))
    labels = labels.cpu()
    hits = (ranked == labels[:, None]) & (best > -torch.inf)  # [N, up to 5]
    images_of = torch.bincount(labels, minlength=num_classes)
    hits_of = torch.bincount(labels[hits[:, 0]], minlength=num_classes)
    present = images_of > 0
    return Accuracy(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(dim=1).double().mean().item(),
        mean_per_class=100 * (hits_of[present].double() / images_of[present]).mean().item(),
    )
