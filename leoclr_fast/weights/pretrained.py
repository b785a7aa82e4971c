"""What an evaluation or an export starts from: the weights that a user names, of a run or in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.resnet import ResNet

from leoclr_fast.config import RunConfig
from leoclr_fast.method.backbone import loaded_backbone
from leoclr_fast.method.methods import build_method, method_class
from leoclr_fast.run.checkpoint import newest_checkpoint
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.weights.architecture import require_exact
from leoclr_fast.weights.backbone_file import Description, read_backbone_file, weights_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A backbone with its weights, and what is known of them."""

    backbone: ResNet
    """On the CPU, float32, in training mode as every new module."""
    description: Description
    path: Path
    """The file or checkpoint that the weights were read from; the run folder where they are untrained."""
    sha256: str
    """Of the weights as they were stored: see `weights_sha256`."""
    run: RunFolder | None
    """The run folder, if one was named."""
    untrained: bool = False
    """Whether these are the weights of before the first step: what pretraining is measured against."""

    @property
    def origin(self) -> str:
        """Where the weights come from, for people."""
        if self.run is None or not self.untrained:
            return str(self.path)
        return f"{self.path} as it began, seed {self.run.read_config().result.seed}"

    @property
    def holdout_seed(self) -> int:
        """Draws the images that pretraining held out, where the data has neither val nor test."""
        return self.run.read_config().result.holdout_seed if self.run else 0

    @property
    def evaluations(self) -> Path:
        """Where evaluations work: a folder in the run, or one beside a file of weights, named after it."""
        beside_file = self.path.with_name(f"{self.path.name}.evaluations")
        return beside_file if self.run is None else self.run.path / "evaluations"

    def describe(self) -> dict[str, Any]:
        """The fields of a result about its weights."""
        return {"weights": self.origin, "weights_sha256": self.sha256, "untrained": self.untrained}


def load_pretrained(weights: Path, *, untrained: bool = False) -> Pretrained:
    """The backbone of RUN|WEIGHTS: a run folder (final weights, else the newest checkpoint), or a .safetensors file.

    untrained: of a run, the weights that it began with.
    Raises FileNotFoundError if there is nothing; ValueError if a tensor is left over, missing, of another shape or not
    finite, if the file is of another kind, or if a file is asked for as it began.
    """
    run, path = RunFolder(weights) if weights.is_dir() else None, weights
    if run is None:
        if untrained:
            raise ValueError(f"--untrained needs a run folder, whose seed drew the first weights; {weights} is none")
        tensors, description = read_backbone_file(weights)
    else:
        config = run.read_config()
        description = Description(recipe=config.recipe, backbone=config.result.backbone, views=config.result.views)
        if untrained:
            tensors = build_method(config.result).kept_encoder.backbone.state_dict()
        else:
            tensors, path = _run_tensors(run, config)
    return Pretrained(
        backbone=loaded_backbone(description.backbone, tensors),
        description=description,
        path=path,
        sha256=weights_sha256(tensors),
        run=run,
        untrained=untrained,
    )


def _run_tensors(run: RunFolder, config: RunConfig) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a run's final weights, else of its newest checkpoint, and that file or checkpoint."""
    path = run.final_weights
    if path.is_file():
        tensors, _ = read_backbone_file(path)
    else:
        newest = newest_checkpoint(run.checkpoints)
        if newest is None:
            raise FileNotFoundError(f"{run.path} has neither final weights nor a checkpoint yet")
        path, _, state = newest
        prefix = f"{method_class(config.result.method.name).encoder_name}.backbone."
        method = state.get("method")
        if not isinstance(method, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in method.items()
        ):
            raise ValueError(f"{path} is no checkpoint of a pretraining: it lacks the tensors of a method")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in method.items() if name.startswith(prefix)}
    require_exact(tensors, config.result.backbone, str(path))
    return tensors, path
