"""Plans of `study`: functions that say what is compared, over which seeds, and by which evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A comparison: every variant is pretrained with every seed, and every run is evaluated by every evaluation."""

    variants: tuple[str, ...]
    """What is compared: each a recipe, and flags of `pretrain` after it. The last one is the baseline."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each variant for each of these; differences are taken between runs of the same seed."""
    epochs: int | None = None
    """Of every run; those of the recipe if not given."""
    max_images: int | None = None
    """Pretrain on at most this many images."""
    pretrain_flags: str = ""
    """Further flags of every `pretrain`: "--precision bf16 --monitor.knn-every-epochs 50"."""
    evaluations: tuple[str, ...] = ("knn",)
    """Each a command that evaluates, with its flags; the data are the study's unless --data is among them."""
    further_evaluations: tuple[str, ...] = ()
    """In addition to --evaluations: "transfer cifar10 --data PATH"."""

    def __post_init__(self) -> None:
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"--{name} {' '.join(map(str, values))} is not allowed: give different ones, at least 1"
                )


def demo_study() -> StudyPlan:
    """The comparison in small, on drawn images: quarter of an hour on two CPU cores, to see everything work."""
    return StudyPlan(
        variants=_variants("demo"),
        seeds=(0, 1),
        epochs=5,
        evaluations=(
            "knn",
            "linear --epochs 10 --lr-grid 1 3 10",
            "finetune --percent 10 --epochs 10 --batch-size 32",
        ),
    )


def cifar10_study() -> StudyPlan:
    """LeOCLR with the sum and with the mean of its losses, and MoCo-v2, on CIFAR-10."""
    return StudyPlan(variants=_variants("cifar10"), evaluations=_EVALUATIONS)


def stl10_study() -> StudyPlan:
    """The same on STL-10: pretrained on its unlabelled images, evaluated on its labelled ones."""
    return StudyPlan(variants=_variants("stl10"), evaluations=_EVALUATIONS)


def imagenet_study() -> StudyPlan:
    """The same on ImageNet-1K with ResNet-50, 200 epochs, one seed: the paper's comparison."""
    return StudyPlan(variants=_variants("imagenet_200ep"), seeds=(0,), evaluations=_EVALUATIONS)


Plan = Callable[[], StudyPlan]
STUDY_PLANS: dict[str, Plan] = {
    plan.__name__: plan for plan in (demo_study, cifar10_study, stl10_study, imagenet_study)
}

_EVALUATIONS = ("knn", "linear --lr-grid 3 10 30 100", "finetune --percent 1", "finetune --percent 10")


def _variants(recipe: str) -> tuple[str, str, str]:
    leoclr = f"leoclr_{recipe} --method.loss-reduction"
    return f"{leoclr} sum", f"{leoclr} mean", f"mocov2_{recipe}"
