"""Hyperparameters tried on a held-out part of train; the best of them, then, on all of it.

This is what `finetune` and `transfer` have in common. Legend: T trials of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save
from torch import nn

from dataset_tools.files import write_file
from dataset_tools.schema import read_json
from dataset_tools.sources import Split
from dataset_tools.splits import hold_out
from leoclr_fast.evaluate.accuracy import Accuracy, accuracy
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.evaluation import Evaluation
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, fine_tune
from leoclr_fast.evaluate.protocols import Metric
from leoclr_fast.run.folder import write_json
from leoclr_fast.run.stepper import Stepper
from leoclr_fast.run.telemetry import ProgressDisplay
from pipelines.config import ViewConfig
from pipelines.loader import Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSearch:
    """What is fine-tuned and tested, and how."""

    evaluation: Evaluation
    train: Split
    val: Split
    """Tested once, with the network of the chosen trial."""
    views: ViewConfig
    trials: tuple[Hyperparameters, ...]
    """[T]; with one of them, nothing is held out. They differ in learning rate and weight decay."""
    metric: Metric
    """What chooses."""
    holdout_fraction: float
    epochs: int | None = None
    """Either these or `steps`."""
    steps: int | None = None
    adapted_batchnorm: bool = False
    """Whether batch-norm's momentum depends on the steps of an epoch, as `TransferProtocol` says."""
    console: Console | None = None

    def run(self) -> dict[str, Any]:
        """Try, choose, train on all of train, test on val.

        What is finished is kept in the evaluation's folder, so that a killed search goes on with the trial that it was
        at.
        Returns top1, top5, mean_per_class (percent), lr and weight_decay (the chosen ones), grid (each trial and what
        it reached on the held-out images, None where it diverged), holdout_images, steps, unreadable_images.
        Raises ValueError if every trial diverged, or if train is smaller than a batch; PausedError.
        """
        grid, chosen, num_held_out, steps_before = None, self.trials[0], 0, 0
        if len(self.trials) > 1:
            grid, num_held_out, steps_before = self._try_all()
            chosen = self._choose(grid)
        path, ranks = self.evaluation.path, self.evaluation.ranks
        with self._training(self.train, self.val) as training:
            stepper = training.stepper("final", steps_before)
            network = training.run(chosen, stepper)
            if network is None:
                raise ValueError(
                    f"the loss became infinite or NaN with learning rate {chosen.lr:g} and weight decay "
                    f"{chosen.weight_decay:g}; give a lower learning rate"
                )
            found = training.test(network)
            unreadable = training.loaders.unreadable_images()
        if ranks.is_main:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            write_file(path / "network.safetensors", save(tensors))
        return {
            **asdict(found),
            "metric": self.metric,
            **_trial(chosen),
            "grid": grid,
            "holdout_images": num_held_out,
            "steps": stepper.total_steps,
            "unreadable_images": unreadable,
            "world_size": ranks.world_size,
        }

    def _try_all(self) -> tuple[list[dict[str, Any]], int, int]:
        """What each trial reached: [T], the number of images held out, and the steps of all trials."""
        num_held_out = max(1, round(self.holdout_fraction * len(self.train)))
        rest, held_out = hold_out(self.train, num_held_out, self.trials[0].seed)
        if not len(held_out):
            raise ValueError(
                f"no class has two images or more, so none can be held out to choose among {len(self.trials)} settings "
                "with; give a single learning rate"
            )
        grid, steps_before, ranks = [], 0, self.evaluation.ranks
        with self._training(rest, held_out) as training:
            for number, trial in enumerate(self.trials, start=1):
                name = f"trial-{number:03}"
                stepper = training.stepper(name, steps_before)
                steps_before += stepper.total_steps
                file = self.evaluation.path / f"{name}.json"
                found = ranks.from_main(_read(file) if ranks.is_main else None)
                if found is None:
                    training.display.say(f"{name} of {len(self.trials)}: lr {trial.lr:g}, wd {trial.weight_decay:g}")
                    network = training.run(trial, stepper)
                    score = None if network is None else getattr(training.test(network), self.metric)
                    found = {**_trial(trial), f"holdout_{self.metric}": score}
                    if ranks.is_main:
                        write_json(file, found)
                    stepper.delete()
                grid.append(found)
        return grid, len(held_out), steps_before

    def _choose(self, grid: Sequence[dict[str, Any]]) -> Hyperparameters:
        """The best on the held-out images; of equals the first."""
        scores = [entry[f"holdout_{self.metric}"] for entry in grid]
        good = [score for score in scores if score is not None]
        if not good:
            raise ValueError(
                "the loss became infinite or NaN with every setting of the grid; give lower learning rates"
            )
        return self.trials[scores.index(max(good))]

    @contextmanager
    def _training(self, train: Split, test: Split) -> Iterator[_Training]:
        """Loaders over the images to learn from and to test on, and a display."""
        evaluation, first = self.evaluation, self.trials[0]
        with evaluation.loaders(train, self.views, first.batch_size, first.seed) as loaders:
            loader = loaders.random_crops(train, loaders.train_order(train))
            total_steps = self.steps or (self.epochs or 0) * loader.steps_per_epoch
            momentum = min(10 / loader.steps_per_epoch, 0.1) if self.adapted_batchnorm else 0.1
            with evaluation.display(self.console, total_steps) as display:
                yield _Training(evaluation, loaders, loader, loaders.center_crops(test), display, total_steps, momentum)


@dataclass(frozen=True, slots=True)
class _Training:
    """Trains any number of networks on the same images, and tests them on the same others."""

    evaluation: Evaluation
    loaders: EvaluationLoaders
    train: Loader
    images: Loader
    """To test on."""
    display: ProgressDisplay
    total_steps: int
    batchnorm_momentum: float

    def stepper(self, name: str, steps_before: int) -> Stepper:
        steps_per_epoch = self.train.steps_per_epoch
        return self.evaluation.stepper(name, self.total_steps, steps_per_epoch, steps_before=steps_before)

    def run(self, parameters: Hyperparameters, stepper: Stepper) -> nn.Module | None:
        return fine_tune(
            self.evaluation.pretrained.backbone,
            len(self.train.split.classes),
            self.train,
            replace(parameters, batchnorm_momentum=self.batchnorm_momentum),
            stepper,
            precision=self.evaluation.options.precision,
            ranks=self.evaluation.ranks,
            display=self.display,
        )

    def test(self, network: nn.Module) -> Accuracy:
        precision, ranks = self.evaluation.options.precision, self.evaluation.ranks
        return accuracy(*extract_features(network, self.images, precision, ranks, normalized=False))


def _trial(parameters: Hyperparameters) -> dict[str, Any]:
    return {"lr": parameters.lr, "weight_decay": parameters.weight_decay}


def _read(file: Path) -> dict[str, Any] | None:
    """What a finished trial reached."""
    return read_json(file, dict[str, Any]) if file.is_file() else None
