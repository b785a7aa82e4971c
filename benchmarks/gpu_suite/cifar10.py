"""Section `cifar10`: LeOCLR and MoCo-v2 pretrain for a few epochs on real images, watched by kNN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError
from leoclr_fast.bench.page import number, table_of
from leoclr_fast.config import RunConfig
from leoclr_fast.recipes import get_recipe
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from pipelines.config import LoaderConfig

_RECIPES = ("leoclr_cifar10", "mocov2_cifar10")
_TINY_IMAGES = 256


def run(config: SuiteConfig, say: Say) -> Answer:
    """The curves of both methods: of each epoch the loss, kNN top-1 (percent) and images/s."""
    if config.data is None:
        raise UnavailableError("no data: give --data with CIFAR-10")
    curves: dict[str, list[dict[str, Any]]] = {}
    note = (
        f"{config.epochs} epochs of the recipe instead of 200, with a cosine schedule over those; a check that both "
        "methods learn, not a comparison of them. The encoders are not compiled."
    )
    for recipe in _RECIPES:
        with TemporaryDirectory() as folder:
            pretrain(_run_config(recipe, config), config.data, Path(folder))
            curves[recipe] = _curve(RunFolder(Path(folder)))
        table = table_of(
            [{"recipe": name, **point} for name, points in curves.items() for point in points],
            {
                "recipe": lambda row: row["recipe"],
                "epoch": lambda row: str(row["epoch"]),
                "loss": lambda row: number(row["loss"], 4),
                "kNN top-1, %": lambda row: number(row["knn_top1"], 2),
                "training images/s": lambda row: number(row["rate"], 0),
            },
        )
        say(table)
        answer = Answer(result={"curves": dict(curves), "data": config.data.name}, markdown=f"{note}\n\n{table}")
        config.keep(answer)
    return answer


def _curve(folder: RunFolder) -> list[dict[str, Any]]:
    """A point for each evaluation, with what was logged last before it."""
    steps, points = folder.read_metrics("step"), []
    for knn in folder.read_metrics("knn"):
        before = [record for record in steps if record["step"] <= knn["step"]][-1:]
        loss, rate = (before[0][name] if before else None for name in ("loss", "images_per_s"))
        points.append({"epoch": round(knn["epoch"]), "loss": loss, "knn_top1": knn["top1"], "rate": rate})
    return points


def _run_config(recipe: str, config: SuiteConfig) -> RunConfig:
    """The recipe, shortened; the tiny one is as narrow as the demo's."""
    base = get_recipe(recipe)
    # Compiling would take longer than it saves in so short a run.
    speed = replace(config.speed(), compile="off", loader=LoaderConfig(name="resident"))
    result, monitor = replace(base.result, epochs=config.epochs), replace(base.monitor, knn_every_epochs=1)
    if config.tiny:
        backbone = replace(result.backbone, width_multiplier=0.125)
        method = replace(result.method, queue_size=512, key_batchnorm_group=8)
        result = replace(result, batch_size=32, max_images=_TINY_IMAGES, backbone=backbone, method=method)
        monitor = replace(monitor, knn_k=20)
    return replace(base, result=result, speed=speed, monitor=monitor)
