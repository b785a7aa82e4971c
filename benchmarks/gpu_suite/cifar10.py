"""Section `cifar10`: LeOCLR and MoCo-v2 pretrain for a few epochs on real images, watched by kNN."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError
from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.bench.page import markdown_table, number
from leoclr_fast.bench.setting import bench_device
from leoclr_fast.bench.timing import synchronize
from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.knn import knn_evaluation
from leoclr_fast.method.methods import METHODS
from leoclr_fast.recipes import get_recipe
from leoclr_fast.schedules import learning_rate
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.config import LoaderConfig
from pipelines.factory import make_loader
from pipelines.order import TrainOrder

_RECIPES = ("leoclr_cifar10", "mocov2_cifar10")
_TINY_IMAGES = 256


def run(config: SuiteConfig, say: Say) -> Answer:
    """The curves of both methods."""
    if config.data is None:
        raise UnavailableError("no data: give --data with CIFAR-10")
    curves: dict[str, dict[str, Any]] = {}
    for recipe in _RECIPES:
        curves[recipe] = short_pretraining(_run_config(recipe, config), config, say)
        answer = _answer(curves, config)
        config.keep(answer)
    return answer


def _answer(curves: dict[str, dict[str, Any]], config: SuiteConfig) -> Answer:
    assert config.data is not None
    table = markdown_table(
        ("recipe", "epoch", "loss", "kNN top-1, %", "training images/s"),
        [
            (
                recipe,
                str(point["epoch"]),
                number(point["loss"], 4),
                number(point["knn_top1"], 2),
                number(point["images_per_s"], 0),
            )
            for recipe, curve in curves.items()
            for point in curve["points"]
        ],
    )
    cut = [recipe for recipe, curve in curves.items() if curve["stopped_early"]]
    note = (
        f"{config.epochs} epochs of the recipe instead of 200, with a cosine schedule over those; a check that both "
        "methods learn, not a comparison of them. images/s without evaluation, the first epoch's warm-up included; "
        "the encoders are not compiled."
    )
    if cut:
        note += f" Out of time before the last epoch: {', '.join(cut)}."
    return Answer(result={"curves": dict(curves), "data": config.data.name}, markdown=f"{note}\n\n{table}")


def short_pretraining(run_config: RunConfig, config: SuiteConfig, say: Say) -> dict[str, Any]:
    """Points of one run: epoch, loss (mean of the epoch), kNN top-1 (percent), images/s. No run folder is written."""
    assert config.data is not None
    result, speed = run_config.result, run_config.speed
    device = bench_device(speed.device)
    deadline = time.perf_counter() + config.soft_limit_s / len(_RECIPES)
    splits = choose_splits(open_source(config.data), holdout_seed=result.holdout_seed)
    split = limited(splits.pretrain, result.max_images)
    order = TrainOrder(num_images=len(split), batch_size=result.batch_size, seed=result.seed)
    training = TrainingState.fresh(run_config, Ranks(), device)
    step = TrainingStep(training, run_config, device)
    views = METHODS[result.method.name].views
    points: list[dict[str, Any]] = []
    with ExitStack() as stack:
        loader = stack.enter_context(
            make_loader(split, views, result.views, speed.loader, order, seed=result.seed, device=device)
        )
        knn = stack.enter_context(
            knn_evaluation(
                splits,
                views=result.views,
                loader=speed.loader,
                batch_size=result.batch_size,
                k=run_config.monitor.knn_k,
                temperature=run_config.monitor.knn_temperature,
                precision=speed.precision,
                device=device,
                ranks=Ranks(),
                max_images=result.max_images,
            )
        )
        if knn is None:
            raise UnavailableError(f"{config.data.name} has no labels, so there is no kNN")

        def evaluate(epoch: int, loss: float | None, images_per_s: float | None) -> None:
            top1 = knn.run(training.method.kept_encoder.backbone).top1
            points.append({"epoch": epoch, "loss": loss, "knn_top1": top1, "images_per_s": images_per_s})
            say(f"{run_config.recipe}, epoch {epoch}: loss {loss}, kNN top-1 {top1:.2f} %, {images_per_s} images/s")

        evaluate(0, None, None)
        for epoch in range(result.epochs):
            start, losses = time.perf_counter(), torch.zeros((), dtype=torch.float64, device=device)
            for batch in loader.batches(epoch):
                schedule = result.optimizer.schedule
                lr = learning_rate(schedule, result.lr, training.step, order.steps_per_epoch, result.epochs)
                losses += step(batch, lr)[0]
            synchronize(device)
            seconds = time.perf_counter() - start
            rate = order.steps_per_epoch * result.batch_size / seconds
            evaluate(epoch + 1, losses.item() / order.steps_per_epoch, rate)
            if not torch.isfinite(losses):
                raise RuntimeError(f"{run_config.recipe}: the loss of epoch {epoch} is not finite")
            if time.perf_counter() + 1.2 * seconds > deadline:
                break
    return {"points": points, "planned_epochs": result.epochs, "stopped_early": points[-1]["epoch"] < result.epochs}


def _run_config(recipe: str, config: SuiteConfig) -> RunConfig:
    """The recipe, shortened; the tiny one is as narrow as the demo's."""
    base = get_recipe(recipe)
    # Compiling would take longer than it saves in so short a run.
    speed = replace(config.speed(), compile="off", loader=LoaderConfig(name="resident"))
    result = replace(base.result, epochs=config.epochs)
    monitor = base.monitor
    if config.tiny:
        result = replace(
            result,
            batch_size=32,
            max_images=_TINY_IMAGES,
            backbone=replace(result.backbone, width_multiplier=0.125),
            method=replace(result.method, queue_size=512),
        )
        monitor = replace(monitor, knn_k=20)
    return replace(base, result=result, speed=speed, monitor=monitor)
