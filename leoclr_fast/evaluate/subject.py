"""What an evaluation is about: a backbone, where it comes from, and how its images were prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.resnet import ResNet

from leoclr_fast.method.methods import build_method
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.weights.backbone_file import weights_sha256
from leoclr_fast.weights.pretrained import load_pretrained
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import shows_images


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A backbone on the CPU, float32."""

    backbone: ResNet
    weights: str
    """The file or checkpoint that it was read from."""
    sha256: str
    """`weights_sha256` of the tensors as they were read."""
    untrained: bool
    """Whether these are the weights of before the first step: what pretraining is measured against."""
    recipe: str
    views: ViewConfig
    """Of the pretraining: size and normalisation of its images."""
    holdout_seed: int
    """Draws the images that pretraining held out, where the data has neither val nor test."""
    run: RunFolder | None
    """Where the results are kept; None for a file of weights."""

    @property
    def evaluations(self) -> Path:
        """Where its evaluations work: a folder in the run, or one beside a file of weights, named after it."""
        return evaluations_beside(Path(self.weights)) if self.run is None else self.run.path / "evaluations"

    def describe(self) -> dict[str, Any]:
        """What a result says of its weights."""
        return {"weights": self.weights, "weights_sha256": self.sha256, "untrained": self.untrained}

    def view_config(self, crop_scale: tuple[float, float], image_size: int | None = None) -> ViewConfig:
        """Views of an evaluation: the pretraining's size and normalisation, torchvision's crop ratio."""
        size = self.views.image_size if image_size is None else image_size
        return replace(self.views, image_size=size, crop_scale=crop_scale, crop_ratio=(3 / 4, 4 / 3))


def load_subject(weights: Path, *, untrained: bool = False) -> Subject:
    """The backbone of RUN|WEIGHTS; untrained: of a run, the weights that it began with.

    Raises FileNotFoundError or ValueError, as `load_pretrained`; ValueError if a file is asked for as it began.
    """
    if untrained:
        return _untrained(weights)
    pretrained = load_pretrained(weights)
    return Subject(
        backbone=pretrained.backbone,
        weights=str(pretrained.path),
        sha256=pretrained.sha256,
        untrained=False,
        recipe=pretrained.description.recipe,
        views=pretrained.description.views,
        holdout_seed=pretrained.run.read_config().result.holdout_seed if pretrained.run else 0,
        run=pretrained.run,
    )


def evaluations_beside(weights: Path) -> Path:
    """The folder for evaluations of a file of weights: `WEIGHTS.evaluations`."""
    return weights.with_name(f"{weights.name}.evaluations")


def require_real_images(loader: LoaderConfig) -> None:
    """Raises ValueError for the synthetic loader: an accuracy on its noise would mean nothing."""
    if not shows_images(loader):
        raise ValueError(
            f"the {loader.name} loader hands out noise, of which no accuracy can be told; choose another --loader"
        )


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode: batch-norm neither learns nor counts."""
    backbone.requires_grad_(False)
    backbone.eval()


def view_settings(views: ViewConfig) -> dict[str, Any]:
    """The part of the views that an evaluation uses."""
    return {
        "image_size": views.image_size,
        "center_crop_fraction": views.center_crop_fraction,
        "flip_probability": views.flip_probability,
        "mean": views.mean,
        "std": views.std,
    }


def _untrained(path: Path) -> Subject:
    if not path.is_dir():
        raise ValueError(f"--untrained needs a run folder, whose seed drew the first weights; {path} is none")
    run = RunFolder(path)
    config = run.read_config()
    result = config.result
    backbone = build_method(result).kept_encoder.backbone
    return Subject(
        backbone=backbone,
        weights=f"{path} as it began, seed {result.seed}",
        sha256=weights_sha256(backbone.state_dict()),
        untrained=True,
        recipe=config.recipe,
        views=result.views,
        holdout_seed=result.holdout_seed,
        run=run,
    )
