"""Hyperparameters tried on a held-out part of train; the best of them, then, on all of it.

This is what `finetune` and `transfer` have in common. Legend: T trials of the grid.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dataset_tools.schema import read_json
from dataset_tools.sources import Split
from leoclr_fast.evaluate.accuracy import Accuracy, accuracy
from leoclr_fast.evaluate.data import EvaluationLoaders, LabelledData, hold_out_to_choose
from leoclr_fast.evaluate.evaluation import Evaluation
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, fine_tune
from leoclr_fast.evaluate.protocols import Metric
from leoclr_fast.run.folder import write_json
from leoclr_fast.run.telemetry import ProgressDisplay
from pipelines.loader import Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSearch:
    """What is fine-tuned and tested, and how."""

    evaluation: Evaluation
    data: LabelledData
    """Its val is tested on once, with the network of the chosen trial."""
    trials: tuple[Hyperparameters, ...]
    """[T]; with one of them, nothing is held out. They differ in learning rate and weight decay."""
    metric: Metric
    """What chooses."""
    epochs: int | None = None
    """Either these or `steps`."""
    steps: int | None = None

    def run(self, folder: Path) -> dict[str, Any]:
        """Try, choose, train on all of train, test on val.

        What is finished is kept in the evaluation's folder, so that a killed search goes on with the trial that it was
        at.
        Returns top1, top5, mean_per_class (percent), lr and weight_decay (the chosen ones), grid (each trial and what
        it reached on the held-out images, None where it diverged), holdout_images, steps, unreadable_images, and what
        describes the data.
        Raises ValueError if every trial diverged, or if train is smaller than a batch; PausedError.
        """
        train, trials, chosen = self.data.train, self.trials, self.trials[0]
        grid: list[dict[str, Any]] = []
        num_held_out = steps_before = 0
        if len(trials) > 1:
            rest, held_out = hold_out_to_choose(train, chosen.seed)
            num_held_out = len(held_out)
            with self._training(rest, held_out) as training:
                grid = [self._tried(training, folder, number) for number in range(len(trials))]
                steps_before = len(trials) * training.total_steps
            scores = [entry[f"holdout_{self.metric}"] for entry in grid]
            good = [score for score in scores if score is not None]
            if not good:
                raise ValueError(
                    "the loss became infinite or NaN with every setting of the grid; give lower learning rates"
                )
            chosen = trials[scores.index(max(good))]
        with self._training(train, self.data.val) as training:
            fitted = training.fit(chosen, folder, "final", steps_before)
            if fitted is None:
                raise ValueError(
                    f"the loss became infinite or NaN with learning rate {chosen.lr:g} and weight decay "
                    f"{chosen.weight_decay:g}; give a lower learning rate"
                )
            network, found = fitted
            self.evaluation.save(folder / "network.safetensors", network.state_dict())
            return {
                **asdict(found),
                "metric": self.metric,
                "lr": chosen.lr,
                "weight_decay": chosen.weight_decay,
                "grid": grid or None,
                "holdout_images": num_held_out,
                "steps": training.total_steps,
                "unreadable_images": training.loaders.unreadable_images(),
                **self.data.describe(),
            }

    def _tried(self, training: _Training, folder: Path, number: int) -> dict[str, Any]:
        """What a trial reached on the held-out images, here or before."""
        ranks, trial, name = self.evaluation.ranks, self.trials[number], f"trial-{number + 1:03}"
        file = folder / f"{name}.json"
        found = ranks.from_main(read_json(file, dict[str, Any]) if ranks.is_main and file.is_file() else None)
        if found is None:
            training.display.say(f"{name} of {len(self.trials)}: lr {trial.lr:g}, wd {trial.weight_decay:g}")
            fitted = training.fit(trial, folder, name, number * training.total_steps)
            score = None if fitted is None else getattr(fitted[1], self.metric)
            found = {"lr": trial.lr, "weight_decay": trial.weight_decay, f"holdout_{self.metric}": score}
            if ranks.is_main:
                write_json(file, found)
                shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
        return found

    @contextmanager
    def _training(self, train: Split, test: Split) -> Iterator[_Training]:
        """Loaders over the images to learn from and to test on, and a display."""
        evaluation, first = self.evaluation, self.trials[0]
        with evaluation.loaders(train, first.batch_size, first.seed) as loaders:
            loader = loaders.random_crops(train, loaders.train_order(train))
            total_steps = self.steps or (self.epochs or 0) * loader.steps_per_epoch
            with evaluation.display(total_steps) as display:
                yield _Training(evaluation, loaders, loader, loaders.center_crops(test), display, total_steps)


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

    def fit(
        self, parameters: Hyperparameters, folder: Path, name: str, steps_before: int
    ) -> tuple[nn.Module, Accuracy] | None:
        """A network and its accuracy, from its checkpoint in the evaluation's folder on; None if it diverged."""
        evaluation, precision = self.evaluation, self.evaluation.options.precision
        stepper = evaluation.stepper(folder, name, self.total_steps, self.train.steps_per_epoch, steps_before)
        network = fine_tune(
            evaluation.pretrained.backbone,
            len(self.train.split.classes),
            self.train,
            parameters,
            stepper,
            precision=precision,
            ranks=evaluation.ranks,
            display=self.display,
        )
        if network is None:
            return None
        return network, accuracy(*extract_features(network, self.images, precision, evaluation.ranks, normalized=False))
