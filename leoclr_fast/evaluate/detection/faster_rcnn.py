"""Faster R-CNN with a C4 backbone, out of torchvision's parts, as MoCo's detection config has it.

conv1 to layer3 (C4, stride 16) are shared; RoIAlign cuts 14 x 14 features out of C4 for each proposal, and layer4
("res5") with one more batch-norm is the box head. What torchvision's own Faster R-CNN does otherwise, and detectron2 as
is done here: RoIAlign is aligned, the box regressor has no columns for the background, box losses are L1, anchors are
not rounded and lie exactly a stride apart.
Legend: N images, R regions of all images, C classes without the background, D features of a region.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import RoIAlign

ASPECT_RATIOS = (0.5, 1.0, 2.0)
POOLED_SIDE = 14

Target = dict[str, Tensor]
Detections = dict[str, Tensor]
"""`boxes` float32 [n, 4] in pixels of the resized image, `scores` [n], `labels` int64 [n] from 1."""


class FasterRCNNC4(nn.Module):
    """Detector out of a ResNet whose classifier is gone; it takes over the ResNet's modules."""

    def __init__(
        self, backbone: ResNet, num_classes: int, *, anchor_sizes: tuple[int, ...], regions_per_image: int
    ) -> None:
        """num_classes: without the background. regions_per_image: that the box head is trained on."""
        super().__init__()
        small_stem = isinstance(backbone.maxpool, nn.Identity)
        stride = 4 if small_stem else 16
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.c4 = nn.Sequential(OrderedDict((name, getattr(backbone, name)) for name in names))
        c4_channels = backbone.layer4[0].conv1.in_channels
        self.rpn = _ProposalNetwork(c4_channels, stride, anchor_sizes)
        self.regions = _Res5Regions(backbone.layer4, backbone.feature_dim, stride, num_classes, regions_per_image)

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """Losses in training mode, where targets are needed; detections in eval mode.

        images [N, 3, H, W], normalised; sizes: height and width of each image within.
        """
        features = self.c4(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), {"c4": features}, targets)
        region_losses, detections = self.regions(features, proposals, sizes, targets)
        return {**rpn_losses, **region_losses}, detections


class _Anchors(nn.Module):
    """Anchors around multiples of the stride, whatever the size of the image, and not rounded."""

    def __init__(self, stride: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._stride, self._sizes = stride, sizes

    def forward(self, images: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        (features,) = feature_maps
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        sides, ratios = (features.new_tensor(values, dtype=dtype) for values in (self._sizes, ASPECT_RATIOS))
        roots = ratios.sqrt()[:, None]
        heights, widths = (roots * sides).flatten(), (sides / roots).flatten()
        at_origin = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
        rows, columns = (torch.arange(size, device=features.device) * self._stride for size in features.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        anchors = (torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4) + at_origin).reshape(-1, 4)
        return [anchors for _ in images.image_sizes]


class _WideRPNHead(RPNHead):
    """Its outputs are at least float32, whatever the features are: boxes and scores need it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_wide(item) for item in logits], [_wide(item) for item in deltas]


class _ProposalNetwork(RegionProposalNetwork):
    """The proposals, with detectron2's numbers and losses."""

    def __init__(self, channels: int, stride: int, anchor_sizes: tuple[int, ...]) -> None:
        num_anchors = len(anchor_sizes) * len(ASPECT_RATIOS)
        super().__init__(
            _Anchors(stride, anchor_sizes),
            _WideRPNHead(channels, num_anchors),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 12_000, "testing": 6_000},
            post_nms_top_n={"training": 2_000, "testing": 1_000},
            nms_thresh=0.7,
        )

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks) > 0 for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        normaliser = self.fg_bg_sampler.batch_size_per_image * len(labels)
        truth, deltas = torch.cat(labels).to(objectness.dtype), torch.cat(regression_targets)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], deltas[positive], reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], truth[sampled], reduction="sum"
        )
        return objectness_loss / normaliser, box_loss / normaliser


class _BoxPredictor(nn.Module):
    """Regions [R, D] -> class logits [R, C + 1], the background first, and box deltas [R, C, 4] without it."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(dim, num_classes + 1)
        self.bbox_pred = nn.Linear(dim, num_classes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return _wide(self.cls_score(regions)), _wide(self.bbox_pred(regions)).unflatten(1, (-1, 4))


class _Res5Regions(RoIHeads):
    """Samples regions and classifies them."""

    def __init__(self, res5: nn.Module, dim: int, stride: int, num_classes: int, regions_per_image: int) -> None:
        # Features [R, c, 14, 14] -> [R, D]; the batch-norm is an additional one of MoCo's config.
        head = {"res5": res5, "norm": nn.BatchNorm2d(dim), "mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
        super().__init__(
            RoIAlign(POOLED_SIDE, spatial_scale=1 / stride, sampling_ratio=0, aligned=True),
            nn.Sequential(OrderedDict(head)),
            _BoxPredictor(dim, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )

    def forward(
        self, features: Tensor, proposals: list[Tensor], sizes: list[tuple[int, int]], targets: list[Target] | None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        if self.training:
            proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.pooled(features, proposals)))
        if self.training:
            return region_losses(logits, deltas, torch.cat(labels), torch.cat(list(regression_targets))), []
        return {}, self.detections(logits, deltas, proposals, sizes)

    def pooled(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        """Features [N, c, h, w] and boxes -> [R, c, 14, 14]; in half precision, boxes would be off by whole pixels."""
        wide = _wide(features)
        return self.box_roi_pool(wide, [own.to(wide.dtype) for own in boxes]).to(features.dtype)

    def detections(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """Of class logits [R, C + 1] and box deltas [R, C, 4]."""
        with_background = F.pad(deltas, (0, 0, 1, 0)).flatten(1)  # no deltas are learned for it
        found = self.postprocess_detections(logits, with_background, proposals, sizes)
        return [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]


def region_losses(logits: Tensor, deltas: Tensor, labels: Tensor, regression_targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy over all regions, and L1 of the right class's box over the foreground, per region.

    logits [R, C + 1], deltas [R, C, 4], labels int64 [R] with 0 for the background, regression_targets [R, 4].
    """
    num_regions = max(1, len(labels))
    foreground = labels.nonzero().squeeze(1)
    chosen = deltas[foreground, labels[foreground] - 1]
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / num_regions,
        "loss_box": F.l1_loss(chosen, regression_targets[foreground], reduction="sum") / num_regions,
    }


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
