"""Published accuracies, each beside the network, data, length and protocol that it was published for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.evaluate.detection.config import DetectionProtocol
from leoclr_fast.evaluate.protocols import LinearProtocol
from leoclr_fast.recipes import get_recipe
from leoclr_fast.report.run_record import RunRecord


class Sizes(NamedTuple):
    """Of an evaluation's data; None where a result does not say."""

    classes: int | None = None
    train_images: int | None = None
    """With labels."""
    val_images: int | None = None
    """That accuracies are reported on."""

    def __str__(self) -> str:
        classes, train, val = ("?" if size is None else f"{size:,}" for size in self)
        return f"{classes} classes, {train} images learned from, {val} tested"


_IMAGENET, _CIFAR10 = Sizes(1000, 1_281_167, 50_000), Sizes(10, 50_000, 10_000)

GAINS = {
    "imagenet": ("+5.1 in linear evaluation", _IMAGENET, "after how many epochs"),
    "stl10": ("+5.12", Sizes(10, 5000, 8000), "by which protocol, network and number of epochs"),
    "cifar10": ("+5.71", _CIFAR10, "by which protocol, network and number of epochs"),
}
"""Data of the recipe → what the LeOCLR paper reports over MoCo-v2, on which images, and what it does not state."""


class Published(NamedTuple):
    """The result of one evaluation, in percent."""

    recipe: str
    """The configuration that has its network, data, epochs and settings."""
    pretrain_images: int
    evaluator: str
    protocol: Mapping[str, Any]
    """Settings of the evaluation."""
    sizes: Sizes
    """Of the evaluation's data; None where it is that of the run."""
    values: Mapping[str, float]
    source: str


def _mocov2(epochs: int, top1: float, **voc: float) -> tuple[Published, Published]:
    """Chen, Fan, Girshick, He 2020: linear evaluation, and detection on VOC by its 11 points."""
    recipe, source = f"mocov2_imagenet_{epochs}ep", "MoCo-v2 (Chen, Fan, Girshick, He 2020)"
    linear = {**as_plain(LinearProtocol()), "max_images": None}
    detection = as_plain(DetectionProtocol(published_rounding=True).config())
    voc_images = Sizes(None, 16_551, 4952)
    return (
        Published(recipe, 1_281_167, "linear", linear, _IMAGENET, {"top1": top1}, source),
        Published(recipe, 1_281_167, "detect-voc", detection, voc_images, voc, source),
    )


PUBLISHED = (
    *_mocov2(200, 67.5, ap_11point=57.0, ap50_11point=82.4, ap75_11point=63.6),
    *_mocov2(800, 71.1, ap_11point=57.4, ap50_11point=82.5, ap75_11point=64.0),
    Published(
        recipe="mocov2_cifar10_demo",
        pretrain_images=50_000,
        evaluator="knn",
        protocol={"k": 200, "temperature": 0.1, "features": "projection"},
        sizes=Sizes(),
        values={"top1": 82.6},
        source="MoCo's CIFAR-10 demo",
    ),
)


def _departures(figure: Published, run: RunRecord, settings: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """In what a run and its evaluation are not what a figure was published for."""
    there, here = as_plain(get_recipe(figure.recipe).result), dict(run.setting("result", {}))
    for seed in ("seed", "holdout_seed"):
        there.pop(seed)
        here.pop(seed, None)
    used = {name: settings[name] for name in figure.protocol if name in settings}
    lines = differing_fields(there, here)
    lines += differing_fields({name: figure.protocol[name] for name in used}, used)
    if run.data.images != figure.pretrain_images:
        own_images = "?" if run.data.images is None else run.data.images
        lines.append(f"images of pretraining: {figure.pretrain_images:,} there, {own_images} here")
    if sizes != figure.sizes:
        lines.append(f"data of the evaluation: {figure.sizes} there, {sizes} here")
    own_data = run.data.fingerprint
    if settings.get("data_fingerprint", own_data) != own_data:
        lines.append("it learned from other data than it is evaluated on")
    return lines


def published_values(
    run: RunRecord, evaluator: str, settings: Mapping[str, Any], sizes: Sizes, notes: list[str]
) -> Mapping[str, float]:
    """What was published for exactly this; empty if nothing was. Where the run's recipe has a figure by this kind of
    evaluation that is not for it, a note says why."""
    for figure in PUBLISHED:
        if figure.evaluator != evaluator:
            continue
        departures = _departures(figure, run, settings, sizes)
        if not departures:
            return figure.values
        if figure.recipe == run.recipe:
            found = ", ".join(f"{name} {value}" for name, value in figure.values.items())
            notes.append(
                f"{figure.source} reports {found} for {figure.recipe}, which is not for {run.path}: "
                + "; ".join(departures)
            )
    return {}
