"""`leoclr-fast detect`: object detection, MoCo's protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say

if TYPE_CHECKING:
    from leoclr_fast.evaluate.detection.config import DetectionConfig


@dataclass(frozen=True, kw_only=True)
class Detect(CommonFlags):
    """Fine-tune Faster R-CNN R50-C4 on VOC07+12 or COCO from a backbone, and report AP, AP50 and AP75.

    The published config of MoCo, unless flags say otherwise; boxes alone, no masks. The same command continues a killed
    one.
    """

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """The --out of a pretrain (final weights, else the newest checkpoint), or a .safetensors file."""
    data: Path
    """voc: the VOCdevkit folder (VOC2007/, VOC2012/). coco: the folder with annotations/, train2017/ and val2017/."""
    dataset: Literal["voc", "coco"] = "voc"
    out: Path | None = None
    """Checkpoints, metrics.jsonl and result.json; if not given RUN/detect-DATASET, or of a file
    WEIGHTS.evaluations/detect-DATASET beside it."""
    train_sets: tuple[str, ...] | None = None
    """voc: VOC2007/trainval VOC2012/trainval. coco: train2017."""
    test_set: str | None = None
    """voc: VOC2007/test. coco: val2017."""
    iterations: int | None = None
    """voc: 24,000. coco: 180,000. With another number the learning rate steps keep their share of it."""
    batch_size: int | None = None
    """Images per iteration over all ranks: 16."""
    lr: float | None = None
    """0.02."""
    lr_steps: tuple[int, ...] | None = None
    """Where the learning rate becomes a tenth. voc: 18,000 22,000. coco: 120,000 160,000."""
    warmup_iterations: int | None = None
    """voc: 100. coco: 1,000."""
    train_sides: tuple[int, ...] | None = None
    """Shorter sides, pixels. voc: 480 to 800 in steps of 32. coco: 640 to 800 in steps of 32."""
    test_side: int | None = None
    """800."""
    max_side: int | None = None
    """Longer side at most, pixels: 1333."""
    anchor_sizes: tuple[int, ...] | None = None
    """32 64 128 256 512."""
    regions_per_image: int | None = None
    """Proposals of each training image that the box head sees: 512."""
    precise_bn_batches: int | None = None
    """Batches that the running statistics are averaged over after training: 200."""
    train_on_images_without_boxes: bool = False
    """They are left out if not given."""
    seed: int | None = None
    """0."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of backbone and heads; proposals and losses are computed in float32 or wider."""
    workers: int = 8
    """Threads that read images, on each rank."""
    checkpoint_every: int = 1000
    """Iterations between two checkpoints."""
    log_every: int = 20
    """Iterations between two lines."""
    max_iterations: int | None = None
    """Stop when this many iterations are done in all; the same command without it continues."""
    max_test_images: int | None = None
    """Evaluate on the first so many test images alone, for trying out."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.detection.run_detection import run_detection

        for name in ("workers", "checkpoint_every", "log_every", "max_iterations", "max_test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is not allowed: give at least 1")
        result = run_detection(
            self.weights,
            self.data,
            self._config(),
            out=self.out,
            device=self.device,
            precision=self.precision,
            workers=self.workers,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            max_iterations=self.max_iterations,
            max_test_images=self.max_test_images,
        )
        if result:
            say(console, _sentence(result, self.dataset))
        return result

    def _config(self) -> DetectionConfig:
        from leoclr_fast.evaluate.detection.config import published_config

        published = published_config(self.dataset)
        given = {
            name: getattr(self, name)
            for name in (
                *("train_sets", "test_set", "iterations", "batch_size", "lr", "lr_steps", "warmup_iterations"),
                *("train_sides", "test_side", "max_side", "anchor_sizes", "regions_per_image", "precise_bn_batches"),
                "seed",
            )
            if getattr(self, name) is not None
        }
        if "iterations" in given and "lr_steps" not in given:
            share = given["iterations"] / published.iterations
            given["lr_steps"] = tuple(sorted({max(1, round(step * share)) for step in published.lr_steps}))
        return replace(published, **given, skip_images_without_boxes=not self.train_on_images_without_boxes)


def _sentence(result: dict[str, Any], dataset: str) -> str:
    if not result["complete"]:
        return f"stopped at iteration {result['iteration']:,} as asked; the same command without the limit continues"

    def shown(name: str) -> str:
        return "undefined" if result[name] is None else f"{result[name]:.2f} %"

    text = f"AP {shown('AP')}, AP50 {shown('AP50')}, AP75 {shown('AP75')} (COCO's definition"
    if dataset == "voc":
        text += (
            f"); by VOC2007's 11 points, as detectron2 and MoCo report: AP {shown('AP_11point')}, "
            f"AP50 {shown('AP50_11point')}, AP75 {shown('AP75_11point')} ("
        )
    else:
        text += "; "
    of_all = "" if result["whole_test_set"] else ", a part of the set alone"
    return f"{text}{result['test_images']:,} test images{of_all})"
