"""What `test_evaluation_ranks` computes alone, and on two gloo ranks: `-m tests.leoclr_fast.evaluation_rank_program`.

Arguments: DATA VOC OUT. Batch-norm takes its running statistics also in training, and anchors and regions are sampled
in their order, so that any number of ranks computes the same, but for the order of sums. Each rank writes what it saw
to `OUT/RANK.pt`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from dataset_tools.sources import open_source
from leoclr_fast.config import BackboneConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.data import EvaluationLoaders, open_labelled_data
from leoclr_fast.evaluate.detection.config import DetectionProtocol
from leoclr_fast.evaluate.detection.image_batches import BatchReader
from leoclr_fast.evaluate.detection.run_detection import _precisions, detect
from leoclr_fast.evaluate.detection.train_detector import build_detector, train_detector
from leoclr_fast.evaluate.detection.voc import read_voc
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, fine_tune
from leoclr_fast.evaluate.knn import KnnEvaluation
from leoclr_fast.method.backbone import build_backbone
from pipelines.config import LoaderConfig, ViewConfig
from tests.leoclr_fast.evaluated import steps_of
from tests.leoclr_fast.forked_ranks import fork_ranks

CPU = torch.device("cpu")
VIEWS = ViewConfig(image_size=16, crop_scale=(0.08, 1.0))
RESIDENT = LoaderConfig(name="resident", workers=1)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Takes its running statistics and leaves them, in training too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def frozen(network: nn.Module) -> nn.Module:
    """The network with every batch-norm frozen, its tensors kept."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = FrozenBatchNorm2d
    return network


def backbone_of(config: BackboneConfig) -> ResNet:
    """With statistics and weights of batch-norm that are no ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = build_backbone(config)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(1.0, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.0)
    return backbone


def fine_tuned(data: Path, out: Path, ranks: Ranks) -> dict[str, Tensor]:
    """A network after six steps of 9 images in float64, in two epochs: on two ranks 5 and 4 of them."""
    split = open_source(data).splits["train"]
    backbone = frozen(backbone_of(BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625)))
    with EvaluationLoaders(VIEWS, RESIDENT, 9, 2, CPU, ranks) as loaders:
        loader = loaders.random_crops(split, loaders.train_order(split))
        parameters = Hyperparameters(lr=0.05, weight_decay=0.01, batch_size=9)
        stepper = steps_of(out / f"tuned-on-{ranks.world_size}", 6, ranks)
        network = fine_tune(backbone, 3, loader, parameters, stepper, "fp64")
    assert network is not None
    return network.state_dict()


def neighbours(data: Path, ranks: Ranks) -> dict[str, Any]:
    """Features of 12 and 40 images in float64, 9 in a batch, and what kNN makes of them."""
    backbone = backbone_of(BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625))
    backbone.double()
    with EvaluationLoaders(VIEWS, RESIDENT, 9, 0, CPU, ranks) as loaders:
        labelled = open_labelled_data(data, holdout_seed=0)
        evaluation = KnnEvaluation(labelled.train, labelled.val, loaders, k=5, temperature=0.1, precision="fp64")
        accuracy = evaluation.run(backbone)
        features, labels = extract_features(backbone, evaluation.queries, "fp64", ranks)
    return {"top1": accuracy.top1, "top5": accuracy.top5, "features": features, "labels": labels}


def detection(voc: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """A detector after four iterations of 5 images in float64, what it found before, and how right that was."""
    config = DetectionProtocol(
        train_sets=("VOC2007/trainval",), iterations=4, batch_size=5, lr=1e-3, lr_steps=(3,), warmup_iterations=2,
        train_sides=(64,), test_side=64, max_side=160, anchor_sizes=(16, 24), regions_per_image=8, precise_bn_batches=0,
    ).config()  # fmt: skip
    train, test = (read_voc(voc, [f"VOC2007/{name}"]) for name in ("trainval", "test"))
    backbone = backbone_of(BackboneConfig(arch="resnet18", width_multiplier=0.125))
    detector = build_detector(backbone, len(train.classes), config, "fp64", ranks, CPU)
    frozen(detector)
    detector.regions.score_thresh = 0.0  # after four iterations it is sure of nothing
    reader = BatchReader(
        mean=VIEWS.mean, std=VIEWS.std, max_side=160, with_ignored=True, workers=1, device=CPU, dtype=torch.float64
    )
    start = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    untrained = detect(detector, test, reader, config.test_side, ranks, "fp64")
    with patch.object(torch, "randperm", lambda number, **options: torch.arange(number, **options)):
        stepper = steps_of(out / f"detector-on-{ranks.world_size}", config.iterations, ranks)
        train_detector(detector, train.images, reader, config, stepper, "fp64")
    return {
        "boxes": [torch.from_numpy(found.boxes) for found in untrained],
        "scores": [torch.from_numpy(found.scores) for found in untrained],
        "labels": [found.labels.tolist() for found in untrained],
        "precisions": _precisions(test, untrained, config) if ranks.is_main else {},
        "state": detector.state_dict(),
        "start": start,
    }


def main(data: Path, voc: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group("cpu") as (ranks, _):
        seen = {"fine-tuned": fine_tuned(data, out, ranks), "neighbours": neighbours(data, ranks)}
        seen["detector"] = detection(voc, out, ranks)
        torch.save(seen, out / f"{ranks.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    fork_ranks(2, partial(main, *map(Path, sys.argv[1:])))
