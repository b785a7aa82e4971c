"""Hyperparameters tried on a held-out part of train; the best of them, then, on all of it.

Legend: T trials of the grid.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors.torch import save
from torchvision.models.resnet import ResNet

from dataset_tools.sources import Split
from dataset_tools.splits import hold_out
from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.accuracy import Accuracy, accuracy
from leoclr_fast.evaluate.evaluation_folder import EvaluationFolder
from leoclr_fast.evaluate.fine_tuning import FineTuner, Training
from leoclr_fast.evaluate.loaders import EvaluationLoaders
from leoclr_fast.evaluate.progress import EvaluationProgress
from leoclr_fast.run.folder import write_atomically, write_json
from pipelines.config import ViewConfig
from pipelines.factory import settle_loader
from pipelines.loader import Loader

log = logging.getLogger(__name__)

Metric = Literal["top1", "mean_per_class"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of a grid."""

    lr: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSearch:
    """What is fine-tuned and tested, and how: the one thing that `finetune` and `transfer` do."""

    backbone: ResNet
    train: Split
    val: Split
    """Tested once, with the network of the chosen trial."""
    trials: tuple[Trial, ...]
    metric: Metric
    """What chooses."""
    epochs: int | None
    """Either these or `steps`."""
    steps: int | None
    batch_size: int
    momentum: float
    holdout_fraction: float
    seed: int
    adapted_batchnorm: bool
    """Whether batch-norm's momentum depends on the steps of an epoch, as `TransferProtocol` says."""
    views: ViewConfig
    speed: SpeedConfig
    ranks: Ranks
    device: torch.device

    def run(self, folder: EvaluationFolder, console: Console | None) -> dict[str, Any]:
        """Try, choose, train on all of train, test on val.

        What is finished is kept in the folder, so that a killed search goes on with the trial that it was at.
        Returns top1, top5, mean_per_class (percent), lr and weight_decay (the chosen ones), grid (each trial and what
        it reached on the held-out images, None where it diverged), holdout_images, steps, unreadable_images.
        Raises ValueError if every trial diverged, or if train is smaller than a batch; PausedError.
        """
        grid: list[dict[str, Any]] | None = None
        num_held_out, steps_tried, chosen = 0, 0, self.trials[0]
        if len(self.trials) > 1:
            grid, num_held_out, steps_tried = self._try_all(folder, console)
            chosen = self._choose(grid)
        with (
            self._loaders(self.train) as loaders,
            self._prepared(self.train, self.val, loaders, console) as (tuner, training, test),
        ):
            network = tuner.train(replace(training, **asdict(chosen)), folder.checkpoints("final", steps_tried))
            if network is None:
                raise ValueError(
                    f"the loss became infinite or NaN with learning rate {chosen.lr:g} and weight decay "
                    f"{chosen.weight_decay:g}; give a lower learning rate"
                )
            found = accuracy(*tuner.scores(network, test))
            unreadable = loaders.unreadable_images()
            if self.ranks.is_main:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
                write_atomically(folder.path / "network.safetensors", save(tensors))
        return {
            **asdict(found),
            "metric": self.metric,
            **asdict(chosen),
            "grid": grid,
            "holdout_images": num_held_out,
            "steps": training.total_steps,
            "unreadable_images": unreadable,
        }

    def _try_all(self, folder: EvaluationFolder, console: Console | None) -> tuple[list[dict[str, Any]], int, int]:
        """What each trial reached, the number of images held out, and the steps of all trials."""
        rest, held_out = hold_out(self.train, max(1, round(self.holdout_fraction * len(self.train))), self.seed)
        if not len(held_out):
            raise ValueError(
                f"no class has two images or more, so none can be held out to choose among {len(self.trials)} settings "
                "with; give a single learning rate"
            )
        grid = []
        with (
            self._loaders(rest) as loaders,
            self._prepared(rest, held_out, loaders, console) as (tuner, training, test),
        ):
            for number, trial in enumerate(self.trials, start=1):
                name = f"trial-{number:03}"
                found = self.ranks.from_main(_read(folder, name))
                if found is None:
                    tuner.display.say(f"{name} of {len(self.trials)}: lr {trial.lr:g}, wd {trial.weight_decay:g}")
                    checkpoints = folder.checkpoints(name, (number - 1) * training.total_steps)
                    network = tuner.train(replace(training, **asdict(trial)), checkpoints)
                    score = None if network is None else accuracy(*tuner.scores(network, test))
                    found = {**asdict(trial), f"holdout_{self.metric}": _of(score, self.metric)}
                    if self.ranks.is_main:
                        write_json(folder.path / f"{name}.json", found)
                    checkpoints.delete()
                grid.append(found)
        return grid, len(held_out), len(grid) * training.total_steps

    def _choose(self, grid: Sequence[dict[str, Any]]) -> Trial:
        """The best on the held-out images; of equals the first."""
        scores = [entry[f"holdout_{self.metric}"] for entry in grid]
        good = [score for score in scores if score is not None]
        if not good:
            raise ValueError(
                "the loss became infinite or NaN with every setting of the grid; give lower learning rates"
            )
        return self.trials[scores.index(max(good))]

    def _loaders(self, train: Split) -> EvaluationLoaders:
        return EvaluationLoaders(
            views=self.views,
            config=settle_loader(train, self.speed.loader, self.device),
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            ranks=self.ranks,
        )

    @contextmanager
    def _prepared(
        self, train: Split, test: Split, loaders: EvaluationLoaders, console: Console | None
    ) -> Iterator[tuple[FineTuner, Training, Loader]]:
        """A tuner on `train`, its training without the values of a trial, and the images to test on."""
        order = loaders.train_order(train)
        total_steps = self.steps or (self.epochs or 0) * order.steps_per_epoch
        tuner = FineTuner(
            backbone=self.backbone,
            num_classes=len(train.classes),
            loader=loaders.random_crops(train, order),
            precision=self.speed.precision,
            ranks=self.ranks,
            display=EvaluationProgress(console, total_steps, enabled=self.ranks.is_main),
        )
        training = Training(
            lr=self.trials[0].lr,
            weight_decay=self.trials[0].weight_decay,
            momentum=self.momentum,
            total_steps=total_steps,
            batch_size=self.batch_size,
            batchnorm_momentum=min(10 / order.steps_per_epoch, 0.1) if self.adapted_batchnorm else 0.1,
            seed=self.seed,
        )
        with closing(tuner.display):
            yield tuner, training, loaders.center_crops(test)


def _read(folder: EvaluationFolder, name: str) -> dict[str, Any] | None:
    """What a finished trial reached."""
    file = folder.path / f"{name}.json"
    if not file.is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def _of(found: Accuracy | None, metric: Metric) -> float | None:
    return None if found is None else getattr(found, metric)
