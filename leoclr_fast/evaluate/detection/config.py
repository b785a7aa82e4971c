"""The settings of `leoclr-fast detect`, and the published values. Nothing here needs torch.

From facebookresearch/moco's detection/configs (pascal_voc_R_50_C4_24k_moco, coco_R_50_C4_2x_moco), and where they are
silent from detectron2's defaults.

What differs from them: a whole global batch has one orientation, not the two images of a GPU; synchronised batch-norm
counts every value once, not every rank; COCO is trained without masks; detections are not rounded before VOC's
evaluation, unless --published-rounding says so.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

from dataset_tools.limits import Count, CountOrZero, Limited, Positive, WeightDecay
from leoclr_fast.evaluate.protocols import EvaluationOptions

DatasetName = Literal["voc", "coco"]

_PUBLISHED: dict[DatasetName, dict[str, Any]] = {
    "voc": {
        "train_sets": ("VOC2007/trainval", "VOC2012/trainval"),
        "test_set": "VOC2007/test",
        "iterations": 24_000,
        "lr_steps": (18_000, 22_000),
        "warmup_iterations": 100,
        "train_sides": tuple(range(480, 801, 32)),
    },
    "coco": {
        "train_sets": ("train2017",),
        "test_set": "val2017",
        "iterations": 180_000,
        "lr_steps": (120_000, 160_000),
        "warmup_iterations": 1000,
        "train_sides": tuple(range(640, 801, 32)),
    },
}
"""VOC: trainval of 2007 and 2012, 24k iterations. COCO: the 2x schedule, boxes without masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionProtocol(Limited):
    """MoCo's, unless flags say otherwise: what is not given is what was published for the data set."""

    dataset: DatasetName = "voc"
    batch_size: Count = 16
    """Images per iteration over all ranks."""
    lr: Positive = 0.02
    """At the start; momentum 0.9."""
    weight_decay: WeightDecay = 1e-4
    """Not on batch-norm's scales and shifts (detectron2's WEIGHT_DECAY_NORM is 0)."""
    test_side: Count = 800
    """Length of the shorter side, pixels."""
    max_side: Count = 1333
    """No longer side is longer, pixels."""
    anchor_sizes: tuple[Count, ...] = (32, 64, 128, 256, 512)
    """Square roots of the anchors' areas, pixels; each with the ratios 1:2, 1:1 and 2:1."""
    regions_per_image: Count = 512
    """Proposals of each training image that the box head sees, at most a quarter of them objects."""
    precise_bn_batches: CountOrZero = 200
    """After training, running statistics become mean and variance of all values in so many training batches
    (TEST.PRECISE_BN, as fvcore computes them today); 0: they stay moving averages."""
    published_rounding: bool = False
    """voc: round scores to 3 decimals and boxes to tenths of a pixel, as detectron2's VOC evaluator does. That makes
    ties: 0.03 points of AP where it makes few, up to 0.5 where it makes many."""
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    train_sets: tuple[str, ...] | None = None
    """voc, folder and image set: VOC2007/trainval VOC2012/trainval. coco, the split: train2017."""
    test_set: str | None = None
    """voc: VOC2007/test. coco: val2017."""
    iterations: int | None = None
    """voc: 24,000. coco: 180,000. With another number the learning rate steps keep their share of it."""
    lr_steps: tuple[int, ...] | None = None
    """Finished iterations at which the learning rate becomes a tenth. voc: 18,000 22,000. coco: 120,000 160,000."""
    warmup_iterations: int | None = None
    """The learning rate grows linearly from a thousandth of --lr. voc: 100. coco: 1,000."""
    train_sides: tuple[int, ...] | None = None
    """Lengths of the shorter side, pixels, of which one is drawn for each image. voc: 480 to 800 in steps of 32. coco:
    640 to 800 in steps of 32."""

    def config(self) -> DetectionConfig:
        """With the published values in place of those that are not given. Raises ValueError for values of no use."""
        published = _PUBLISHED[self.dataset]
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.iterations is not None and self.lr_steps is None:
            share = self.iterations / published["iterations"]
            given["lr_steps"] = tuple(sorted({max(1, round(step * share)) for step in published["lr_steps"]}))
        given = {name: published[name] if value is None else value for name, value in given.items()}
        for name in ("train_sides", "anchor_sizes", "train_sets"):
            if not given[name]:
                raise ValueError(f"--{name.replace('_', '-')} without a value is not allowed: give one or more")
        return DetectionConfig(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig(DetectionProtocol):
    """Everything that changes the result."""

    train_sets: tuple[str, ...]
    test_set: str
    iterations: Count
    lr_steps: tuple[Count, ...]
    warmup_iterations: CountOrZero
    train_sides: tuple[Count, ...]

    def learning_rate(self, iteration: int) -> float:
        """At an iteration, counted from 0."""
        lr = self.lr * 0.1 ** sum(iteration >= step for step in self.lr_steps)
        if iteration >= self.warmup_iterations:
            return lr
        done = iteration / self.warmup_iterations
        return lr * (0.001 * (1 - done) + done)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionOptions(EvaluationOptions):
    """What changes no result: where, how fast, how often."""

    workers: Count = 8
    """Threads that read images, on each rank."""
    max_steps: Count | None = None
    """Pause when so many iterations are done in all, without a result; the same command without it continues."""
    checkpoint_every_s: Annotated[float, Meta(ge=0)] = 60.0
    """A checkpoint at the end of an epoch, or after 1,000 iterations of a longer one, once the last one is so many
    seconds old."""
