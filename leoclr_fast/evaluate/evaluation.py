"""An evaluation on disk: its settings, its checkpoints, and in the end its result."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torchvision.models.resnet import ResNet

from dataset_tools.files import write_file
from dataset_tools.schema import read_json
from dataset_tools.sources import Split
from dataset_tools.stop_signals import stop_signals
from dataset_tools.terminal import PlainConsole
from leoclr_fast.config_file import differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import EVALUATION_TIMEOUT_S, process_group
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.protocols import EvaluationOptions
from leoclr_fast.machine.precision import encoder_dtype, settled
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.run.stepper import PausedError, Stepper
from leoclr_fast.run.telemetry import ProgressDisplay
from leoclr_fast.weights.backbone_file import tensor_bytes
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained
from pipelines.config import ViewConfig
from pipelines.factory import settle_loader, shows_images

log = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation of some weights on this machine.

    It has a folder: `settings.json`, checkpoints while it trains, `result.json` once it is finished. That lies in the
    run folder, or beside a file of weights, under a name that the settings determine, so that the same command
    continues it.
    """

    pretrained: Pretrained
    options: Any
    """The `EvaluationOptions` as they were given, but for what `auto` means here."""
    ranks: Ranks
    device: torch.device
    console: Console | None

    def result(self, name: str, settings: dict[str, Any], compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result of before, or of `compute`, which is then kept in the folder and in the run's `evaluations.jsonl`.

        name: of the evaluator. settings: all that the result depends on but the weights, plain JSON. compute: gets the
        folder, which is held against a second process.
        Returns plain JSON with `evaluator` and `settings`, {} on other ranks than the first; `complete` is False where
        the evaluation was paused before it had a result. Raises ValueError if the folder cannot be written or holds an
        evaluation with other settings, RuntimeError if another process works in it.
        """
        settings = json.loads(json.dumps({"weights_sha256": self.pretrained.sha256, **settings}))
        digest = hashlib.sha256(json.dumps([name, settings], sort_keys=True).encode()).hexdigest()
        path = self.options.out or self.pretrained.evaluations / f"{name}-{digest[:12]}"
        is_main = self.ranks.is_main
        with ExitStack() as stack:
            found = self.ranks.from_main(_enter(path, {"evaluator": name, **settings}, stack) if is_main else None)
            if found is None:
                try:
                    found = {"evaluator": name, **compute(path), **self.pretrained.describe()}
                    found |= {"world_size": self.ranks.world_size, "settings": settings}
                    if is_main:
                        self._keep(path, found)
                except PausedError as paused:
                    found = {"complete": False, "step": paused.step, "training": paused.folder.name, "out": str(path)}
        return found if is_main else {}

    def frozen_backbone(self) -> ResNet:
        """On the device, without gradients and in eval mode: batch-norm neither learns nor counts."""
        backbone = self.pretrained.backbone.to(self.device, encoder_dtype(self.options.precision))
        return backbone.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def views(self) -> ViewConfig:
        """The pretraining's image size, if the options have no other, and normalisation; torchvision's random crop.

        Raises ValueError for the synthetic loader: an accuracy on its noise would mean nothing.
        """
        if not shows_images(self.options.loader):
            raise ValueError(
                f"the {self.options.loader.name} loader hands out noise, on which no accuracy can be measured; choose "
                "another --loader"
            )
        views = self.pretrained.description.views
        size = self.options.image_size or views.image_size
        return replace(views, image_size=size, crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))

    def view_settings(self, fingerprint: str) -> dict[str, Any]:
        """What a result depends on besides its protocol. fingerprint: of the data."""
        names = ("image_size", "center_crop_fraction", "flip_probability", "mean", "std")
        return {
            **{name: getattr(self.views(), name) for name in names},
            "precision": self.options.precision,
            "data_fingerprint": fingerprint,
            "max_images": self.options.max_images,
        }

    def loaders(self, train: Split, batch_size: int, seed: int) -> EvaluationLoaders:
        """The loaders of a training on `train` and of its tests. batch_size: over all ranks."""
        config = settle_loader(train, self.options.loader, self.device)
        return EvaluationLoaders(self.views(), config, batch_size, seed, self.device, self.ranks)

    def stepper(
        self, training: Path, total_steps: int, save_every_steps: int, display: ProgressDisplay, before: int = 0
    ) -> Stepper:
        """The steps of one training, which follows `before` steps of others.

        training: the evaluation's folder and the name of the training's checkpoints, which go when there is a result.
        """
        return Stepper(
            training.parent / "checkpoints" / training.name,
            total_steps=total_steps,
            ranks=self.ranks,
            save_every_steps=save_every_steps,
            save_every_s=self.options.checkpoint_every_s,
            pause_after=self.options.max_steps,
            steps_before=before,
            display=display,
        )

    def display(self, total_steps: int) -> closing[ProgressDisplay]:
        """The progress of a training, shown by the first rank."""
        return closing(ProgressDisplay(self.console or PlainConsole(), total_steps, self.ranks.is_main, _LINE_EVERY_S))

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a .safetensors file."""
        if self.ranks.is_main:
            write_file(path, tensor_bytes(tensors))

    def _keep(self, path: Path, result: dict[str, Any]) -> None:
        if self.pretrained.run is not None:
            self.pretrained.run.add_evaluation(result["evaluator"], result)
        write_json(path / "result.json", result | {"environment": environment(self.device, self.ranks.world_size)})
        shutil.rmtree(path / "checkpoints", ignore_errors=True)


@contextmanager
def evaluation_of(weights: Path, options: EvaluationOptions, console: Console | None) -> Iterator[Evaluation]:
    """The evaluation of RUN|WEIGHTS, as `load_pretrained` reads them, between the ranks of a process group.

    A signal ends what is done here at once; only the steps of a training save first.
    """
    with stop_signals() as stop, process_group(options.device, timeout_s=EVALUATION_TIMEOUT_S) as (ranks, device):
        stop.patience_s = 0
        yield Evaluation(
            pretrained=load_pretrained(weights, untrained=options.untrained),
            options=settled(options, device),
            ranks=ranks,
            device=device,
            console=console,
        )


def _enter(path: Path, settings: dict[str, Any], stack: ExitStack) -> dict[str, Any] | None:
    """Make and lock the folder; its result, if there is one."""
    described = path / "settings.json"
    try:
        there = sorted(file.name for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else []
        if there and not described.exists():
            raise ValueError(
                f"{path} holds other files ({', '.join(there[:3])}…) and no evaluation of this version; give --out a "
                "new or empty folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunFolder(path).locked())
        if described.exists():
            differences = differing_fields(read_json(described, dict[str, Any]), settings)
            if differences:
                raise ValueError(
                    f"{path} holds another evaluation: {'; '.join(differences[:6])}. Give the same options as there to "
                    "continue it, or another --out."
                )
        write_json(described, settings)
    except OSError as error:
        raise ValueError(
            f"cannot write to {path}: {error.strerror}; give --out a folder that the evaluation can work in"
        ) from error
    result = path / "result.json"
    if not result.is_file():
        return None
    document = read_json(result, dict[str, Any])
    log.info("this evaluation was made before: %s; delete that file to make it again", result)
    return {key: value for key, value in document.items() if key != "environment"}
