"""What an evaluation or an export starts from: the weights that a user names, of a run or in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.models.resnet import ResNet

from leoclr_fast.config import BackboneConfig, RunConfig
from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.method.methods import method_class
from leoclr_fast.run.checkpoint import load_newest_checkpoint
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.weights.accounting import take_account
from leoclr_fast.weights.architecture import network_tensors, require_exact
from leoclr_fast.weights.backbone_file import Description, read_backbone_file, weights_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A backbone with its weights, and what is known of them."""

    backbone: ResNet
    """On the CPU, float32, in training mode as every new module."""
    description: Description
    path: Path
    """The file that the weights were read from."""
    sha256: str
    """Of the weights as they were stored: see `weights_sha256`."""
    run: RunFolder | None
    """The run folder, if one was named."""


def load_pretrained(weights: Path) -> Pretrained:
    """The backbone of RUN|WEIGHTS: a run folder (final weights, else the newest checkpoint), or a .safetensors file.

    Raises FileNotFoundError if there is nothing; ValueError if a tensor is left over, missing, of another shape or not
    finite, or if the file is of another kind.
    """
    if not weights.is_dir():
        tensors, description = read_backbone_file(weights)
        return Pretrained(
            backbone=_filled(tensors, description.backbone),
            description=description,
            path=weights,
            sha256=weights_sha256(tensors),
            run=None,
        )
    run = RunFolder(weights)
    config = run.read_config()
    tensors, path = _run_tensors(run, config)
    return Pretrained(
        backbone=_filled(tensors, config.result.backbone),
        description=Description(recipe=config.recipe, backbone=config.result.backbone, views=config.result.views),
        path=path,
        sha256=weights_sha256(tensors),
        run=run,
    )


def load_backbone(run: RunFolder, config: RunConfig) -> tuple[ResNet, str]:
    """The backbone of a run, on the CPU, and where it was read from: its final weights, else its newest checkpoint.

    Raises FileNotFoundError if the run has neither, ValueError if a tensor is left over, missing or not finite.
    """
    tensors, path = _run_tensors(run, config)
    return _filled(tensors, config.result.backbone), str(path)


def _run_tensors(run: RunFolder, config: RunConfig) -> tuple[dict[str, Tensor], Path]:
    if run.final_weights.is_file():
        tensors, description = read_backbone_file(run.final_weights)
        if description.backbone != config.result.backbone:
            raise ValueError(
                f"{run.final_weights} holds another backbone ({description.backbone}) than the run's configuration "
                f"says ({config.result.backbone}); one of the two files is not this run's"
            )
        return tensors, run.final_weights
    newest = load_newest_checkpoint(run.checkpoints)
    if newest is None:
        raise FileNotFoundError(f"{run.path} has neither final weights nor a checkpoint yet")
    path, state = newest
    prefix = f"{method_class(config.result.method.name).encoder_name}.backbone."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state["method"].items() if name.startswith(prefix)}
    backbone = config.result.backbone
    require_exact(take_account(tensors, network_tensors(backbone)), backbone, str(path))
    return tensors, path


def _filled(tensors: dict[str, Tensor], config: BackboneConfig) -> ResNet:
    backbone = build_backbone(config)
    backbone.load_state_dict(tensors)
    return backbone
