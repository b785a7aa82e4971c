"""The commands that evaluate weights: `leoclr-fast knn`, `linear`, `finetune`, `transfer` and `detect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.evaluate.detection.config import DetectionOptions, DetectionProtocol
from leoclr_fast.evaluate.protocols import (
    FineTuneProtocol,
    KnnProtocol,
    LinearProtocol,
    TrainingOptions,
    TransferProtocol,
    ViewOptions,
)

_Flattened = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(CommonFlags):
    """Whose weights."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """The --out of a pretrain (its final weights, else its newest checkpoint), or a final.safetensors."""


@dataclass(frozen=True, kw_only=True)
class Knn(EvaluationFlags):
    """Weighted kNN accuracy of a frozen backbone: leoclr-fast knn RUN --data PATH."""

    data: Path
    """As in pretrain: the bank is train, the queries are val, else test, else a held-out part of train."""
    protocol: Annotated[KnnProtocol, _Flattened] = field(default_factory=KnnProtocol)
    options: Annotated[ViewOptions, _Flattened] = field(default_factory=ViewOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import knn

        values = knn.run(self.weights, self.data, self.protocol, self.options, console=console)
        if values:
            say(
                console,
                f"kNN top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} % (k = {values['k']}, temperature "
                f"{values['temperature']:g}; {values['bank_images']:,} images in the bank, "
                f"{values['query_images']:,} queries)",
            )
        return values


@dataclass(frozen=True, kw_only=True)
class Linear(EvaluationFlags):
    """Linear classification of a frozen backbone's features: leoclr-fast linear RUN --data PATH."""

    data: Path
    """Learned from is train; tested is val, else test, else a held-out part of train."""
    protocol: Annotated[LinearProtocol, _Flattened] = field(default_factory=LinearProtocol)
    """MoCo-v2's; changes the result."""
    options: Annotated[TrainingOptions, _Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import linear

        values = linear.run(self.weights, self.data, self.protocol, self.options, console=console)
        if not values or _say_paused(console, values):
            return values
        for entry in values["grid"] or ():
            held_out = entry["holdout_top1"]
            reached = f"{held_out:.2f} % of the held-out images" if held_out is not None else "diverged"
            say(console, f"  learning rate {entry['lr']:g}: {reached}")
        kind = "linear estimate (cached features)" if values["estimate"] else "linear"
        say(
            console,
            f"{kind} top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} % (learning rate {values['lr']:g}; "
            f"{values['train_images'] - values['holdout_images']:,} images learned from, {values['val_images']:,} "
            f"of {values['val_split']} tested; backbone unchanged, sha256 {values['backbone_sha256_after'][:16]}…)",
        )
        return values


@dataclass(frozen=True, kw_only=True)
class Finetune(EvaluationFlags):
    """Fine-tune the network on a part of the labels: leoclr-fast finetune RUN --data PATH --percent 1."""

    data: Path
    """A part of train is learned from; tested is val, else test, else a held-out part of train."""
    protocol: Annotated[FineTuneProtocol, _Flattened]
    """SimCLR's; changes the result."""
    options: Annotated[TrainingOptions, _Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import finetune

        values = finetune.run(self.weights, self.data, self.protocol, self.options, console=console)
        for found in values.get("evaluations", ()):
            if not _say_paused(console, found):
                say(
                    console,
                    f"finetune on {found['percent']:.4g} % of the labels: top-1 {found['top1']:.2f} %, top-5 "
                    f"{found['top5']:.2f} % ({found['labels']:,} labels, sha256 {found['labels_sha256'][:16]}…, "
                    f"{found['epochs']} epochs, learning rate {found['lr']:g}; {found['val_images']:,} images of "
                    f"{found['val_split']} tested)",
                )
        return values


@dataclass(frozen=True, kw_only=True)
class Transfer(EvaluationFlags):
    """Fine-tune the network on another data set: leoclr-fast transfer RUN DATASET --data PATH."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """cifar10, cifar100, cars (Stanford Cars), pets (Oxford-IIIT Pets) or birdsnap."""
    data: Path
    """As torchvision lays it out on disk, or any source of images with its classes and splits."""
    protocol: Annotated[TransferProtocol, _Flattened] = field(default_factory=TransferProtocol)
    """SimCLR's: 56 trials and the final training, of 20,000 steps each. Changes the result."""
    options: Annotated[TrainingOptions, _Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import transfer

        values = transfer.run(self.weights, self.dataset, self.data, self.protocol, self.options, console=console)
        if values and not _say_paused(console, values):
            metric = {"top1": "top-1", "mean_per_class": "mean per class"}[values["metric"]]
            say(
                console,
                f"transfer to {values['data_kind']}: {metric} {values[values['metric']]:.2f} % "
                f"(learning rate {values['lr']:.4g}, weight decay {values['weight_decay']:.4g}, {values['steps']:,} "
                f"steps; {values['val_images']:,} test images)",
            )
        return values


@dataclass(frozen=True, kw_only=True)
class Detect(EvaluationFlags):
    """Fine-tune Faster R-CNN R50-C4 on VOC07+12 or COCO from a backbone, and report AP, AP50 and AP75.

    The published config of MoCo, unless flags say otherwise; boxes alone, no masks. VOC's AP is that of its 11 points,
    COCO's its own. The same command continues a killed one.
    """

    data: Path
    """voc: the VOCdevkit folder (VOC2007/, VOC2012/). coco: the folder with annotations/, train2017/ and val2017/."""
    protocol: Annotated[DetectionProtocol, _Flattened] = field(default_factory=DetectionProtocol)
    options: Annotated[DetectionOptions, _Flattened] = field(default_factory=DetectionOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.detection import run_detection

        values = run_detection.run(self.weights, self.data, self.protocol, self.options, console=console)
        if values and not _say_paused(console, values):
            say(console, _detections(values, self.protocol.dataset))
        return values


def _say_paused(console: Console, values: dict[str, Any]) -> bool:
    """Say so if --max-steps ended an evaluation before it had a result; whether it did."""
    if values.get("complete", True):
        return False
    say(
        console,
        f"paused after step {values['step']:,}, as --max-steps asks, in {values['out']}; there is no result yet, and "
        "the same command without --max-steps continues",
    )
    return True


def _detections(values: dict[str, Any], dataset: str) -> str:
    suffix, kind = ("_11point", "VOC2007's 11 points") if dataset == "voc" else ("", "COCO's definition")
    found = {name: values[name + suffix] for name in ("AP", "AP50", "AP75")}
    shown = ", ".join(f"{name} {'undefined' if ap is None else f'{ap:.2f} %'}" for name, ap in found.items())
    return f"{shown} ({kind}; {values['test_images']:,} test images)"
