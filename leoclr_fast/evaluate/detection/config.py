"""What a detection run is told, and the published values.

From facebookresearch/moco's detection/configs (pascal_voc_R_50_C4_24k_moco, coco_R_50_C4_2x_moco), and where they are
silent from detectron2's defaults.

What differs from them: a whole global batch has one orientation, not the two images of a GPU; synchronised batch-norm
counts every value once, not every rank; COCO is trained without masks; scores are not rounded before the evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DatasetName = Literal["voc", "coco"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    """Everything that changes the result. The defaults are those of VOC07+12, 24k iterations."""

    dataset: DatasetName = "voc"
    train_sets: tuple[str, ...] = ("VOC2007/trainval", "VOC2012/trainval")
    """VOC: folder and image set. COCO: name of the split, as train2017."""
    test_set: str = "VOC2007/test"
    iterations: int = 24_000
    batch_size: int = 16
    """Images per iteration over all ranks."""
    lr: float = 0.02
    lr_steps: tuple[int, ...] = (18_000, 22_000)
    """Finished iterations at which the learning rate becomes a tenth."""
    warmup_iterations: int = 100
    """The learning rate grows linearly from a thousandth of `lr`."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Not on batch-norm's scales and shifts (detectron2's WEIGHT_DECAY_NORM is 0)."""
    train_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Lengths of the shorter side, pixels, of which one is drawn for each image."""
    test_side: int = 800
    max_side: int = 1333
    """No longer side is longer."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square roots of the anchors' areas, pixels; each with the ratios 1:2, 1:1 and 2:1."""
    regions_per_image: int = 512
    """Proposals of each training image that the box head sees, at most a quarter of them objects."""
    precise_bn_batches: int = 200
    """After training, running statistics become plain means over so many training batches (TEST.PRECISE_BN); 0: they
    stay moving averages."""
    skip_images_without_boxes: bool = True
    """Train only on images with boxes (detectron2's FILTER_EMPTY_ANNOTATIONS)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "test_side", "max_side", "regions_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give at least 1")
        for name in ("warmup_iterations", "precise_bn_batches", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give 0 or more")
        if self.seed >= 2**31:
            raise ValueError(f"seed {self.seed} is not allowed: give a number below 2**31")
        for name in ("train_sides", "anchor_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} {values} are not allowed: give one or more lengths of at least 1 pixel")
        if not self.lr > 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"lr {self.lr}, momentum {self.momentum} are not allowed: give lr > 0, 0 <= momentum < 1")
        if list(self.lr_steps) != sorted(self.lr_steps) or (self.lr_steps and self.lr_steps[0] < 1):
            raise ValueError(f"lr_steps {self.lr_steps} are not allowed: give rising numbers of iterations")
        if not self.train_sets:
            raise ValueError("no train set is given")

    def learning_rate(self, iteration: int) -> float:
        """At an iteration, counted from 0."""
        lr = self.lr * 0.1 ** sum(iteration >= step for step in self.lr_steps)
        if iteration >= self.warmup_iterations:
            return lr
        done = iteration / self.warmup_iterations
        return lr * (0.001 * (1 - done) + done)


def published_config(dataset: DatasetName) -> DetectionConfig:
    """VOC: trainval of 2007 and 2012, 24k iterations. COCO: the 2x schedule, 180k iterations, boxes without masks."""
    if dataset == "voc":
        return DetectionConfig()
    return DetectionConfig(
        dataset="coco",
        train_sets=("train2017",),
        test_set="val2017",
        iterations=180_000,
        lr_steps=(120_000, 160_000),
        warmup_iterations=1000,
        train_sides=(640, 672, 704, 736, 768, 800),
    )
