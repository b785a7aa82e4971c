"""Recipes: functions that return a whole run's configuration. What to expect stands in their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dataset_tools.limits import unknown
from leoclr_fast.config import (
    BackboneConfig,
    MethodConfig,
    MonitorConfig,
    OptimizerConfig,
    ResultConfig,
    RunConfig,
    SpeedConfig,
)
from pipelines.config import ViewConfig

Recipe = Callable[[], RunConfig]


def leoclr_imagenet_200ep() -> RunConfig:
    """LeOCLR, ResNet-50, ImageNet-1K, 200 epochs: the paper's setting.

    From the paper: SGD, learning rate 0.03, weight decay 1e-4, momentum 0.9, batch 256, the sum of both losses.
    From MoCo-v2, where the paper is silent: temperature 0.2, queue 65,536, key momentum 0.999, 128-d MLP head,
    cosine schedule per epoch, all augmentations. One positive's keys per image enter the queue (our choice).
    The sum doubles the gradient, so at equal learning rate LeOCLR steps twice as far as MoCo-v2:
    `--method.loss-reduction mean` takes that out of a comparison.
    Hardware: the paper used three A100-80GB. The paper reports +5.1 points over MoCo-v2 in linear evaluation.
    Not yet run by us: no hours and no accuracy of our own to state.
    """
    return _imagenet("leoclr_imagenet_200ep", MethodConfig(name="leoclr"), epochs=200)


def leoclr_imagenet_800ep() -> RunConfig:
    """LeOCLR, ResNet-50, ImageNet-1K, 800 epochs: as `leoclr_imagenet_200ep`, four times as long. Not yet run by us."""
    return _imagenet("leoclr_imagenet_800ep", MethodConfig(name="leoclr"), epochs=800)


def mocov2_imagenet_200ep() -> RunConfig:
    """MoCo-v2, ResNet-50, ImageNet-1K, 200 epochs: the published setting (facebookresearch/moco).

    Published: 67.5 % top-1 in linear evaluation, 53 hours on 8 V100. Not yet run by us.
    """
    return _imagenet("mocov2_imagenet_200ep", MethodConfig(name="mocov2"), epochs=200)


def mocov2_imagenet_800ep() -> RunConfig:
    """MoCo-v2, ResNet-50, ImageNet-1K, 800 epochs: published 71.1 % top-1 in linear evaluation. Not yet run by us."""
    return _imagenet("mocov2_imagenet_800ep", MethodConfig(name="mocov2"), epochs=800)


def leoclr_stl10() -> RunConfig:
    """LeOCLR on STL-10's 100,000 unlabelled images, 96 pixels.

    From the paper: SGD, learning rate 0.03, weight decay 1e-4, momentum 0.9, batch 256, MoCo-v2's augmentation.
    From MoCo's CIFAR-10 demo, where the paper is silent: ResNet-18 with the small stem, queue 4,096, key momentum
    0.99, temperature 0.1, 200 epochs, kNN with k = 200 and temperature 0.1.
    The sum of the losses doubles the gradient against MoCo-v2: see `leoclr_cifar10`. Not yet run by us.
    """
    return _small("leoclr_stl10", "leoclr", ViewConfig(image_size=96))


def mocov2_stl10() -> RunConfig:
    """MoCo-v2 on STL-10's unlabelled images: everything but the method as in `leoclr_stl10`. Not yet run by us."""
    return _small("mocov2_stl10", "mocov2", ViewConfig(image_size=96))


def leoclr_cifar10() -> RunConfig:
    """LeOCLR on CIFAR-10's 50,000 training images, 32 pixels.

    From the paper: SGD, learning rate 0.03, weight decay 1e-4, momentum 0.9, batch 256, MoCo-v2's augmentation.
    From MoCo's CIFAR-10 demo, where the paper is silent: ResNet-18 with the small stem, queue 4,096, key momentum
    0.99, temperature 0.1, no blur at 32 pixels, 200 epochs, kNN with k = 200 and temperature 0.1.
    The sum of the losses (eq. 2) doubles the gradient, so LeOCLR steps twice as far as MoCo-v2. In a small trial
    (narrow ResNet-18, 20,000 images, 12 epochs) `--method.loss-reduction mean` ended 5 kNN points above the sum:
    42.5 against 37.4, MoCo-v2 42.6. The full length has not yet been run by us.
    """
    return _small("leoclr_cifar10", "leoclr", _CIFAR_VIEWS)


def mocov2_cifar10() -> RunConfig:
    """MoCo-v2 on CIFAR-10: everything but the method as in `leoclr_cifar10`. The full length has not yet been run."""
    return _small("mocov2_cifar10", "mocov2", _CIFAR_VIEWS)


def leoclr_demo() -> RunConfig:
    """LeOCLR on the drawn demo images: two minutes on two CPU cores, to see everything work.

    Measured on two cores of an AMD EPYC, three seeds: 119 s, kNN top-1 from 13.7 to 39.7 % (`benchmarks/results/
    demo_cpu.md`; MoCo-v2 from 13.7 to 28.2 %). The recipe and the drawings were chosen by such trials on the same val
    images, for LeOCLR and not for MoCo-v2: this is a demonstration, not a comparison.

    Values of MoCo's CIFAR-10 demo, made small: a narrow ResNet-18, few epochs, a higher learning rate. The mean of
    the losses is taken, so that LeOCLR and MoCo-v2 step equally far.
    """
    return _demo("leoclr_demo", "leoclr")


def mocov2_demo() -> RunConfig:
    """MoCo-v2 on the drawn demo images: everything but the method as in `leoclr_demo`."""
    return _demo("mocov2_demo", "mocov2")


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        leoclr_imagenet_200ep,
        leoclr_imagenet_800ep,
        mocov2_imagenet_200ep,
        mocov2_imagenet_800ep,
        leoclr_stl10,
        mocov2_stl10,
        leoclr_cifar10,
        mocov2_cifar10,
        leoclr_demo,
        mocov2_demo,
    )
}


def get_recipe(name: str) -> RunConfig:
    """The configuration of a recipe. Raises ValueError for an unknown name; the nearest names are offered."""
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name]()


_CIFAR_VIEWS = ViewConfig(
    image_size=32,
    blur_probability=0.0,
    center_crop_fraction=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)


def _imagenet(recipe: str, method: MethodConfig, epochs: int) -> RunConfig:
    return RunConfig(recipe=recipe, result=ResultConfig(epochs=epochs, method=method))


def _small(recipe: str, method: str, views: ViewConfig) -> RunConfig:
    return RunConfig(
        recipe=recipe,
        result=ResultConfig(
            epochs=200,
            backbone=BackboneConfig(arch="resnet18", stem="small"),
            method=MethodConfig(name=method, queue_size=4096, key_momentum=0.99, temperature=0.1),
            views=replace(views, center_crop_fraction=1.0),
        ),
    )


def _demo(recipe: str, method: str) -> RunConfig:
    small = _small(recipe, method, ViewConfig(image_size=32, blur_probability=0.0))
    return replace(
        small,
        result=replace(
            small.result,
            epochs=12,
            batch_size=64,
            backbone=replace(small.result.backbone, width_multiplier=0.125),
            method=replace(small.result.method, loss_reduction="mean", queue_size=2048),
            optimizer=OptimizerConfig(base_lr=0.12, schedule="cosine_per_step", weight_decay=5e-4),
        ),
        speed=SpeedConfig(compile="off"),  # it would take longer than the training
        monitor=MonitorConfig(knn_every_epochs=3, knn_k=20),
    )
