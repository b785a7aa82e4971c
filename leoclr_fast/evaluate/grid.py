"""Hyperparameters tried on a held-out part of train; the best of them, then, on all of it.

This is what `finetune` and `transfer` have in common. Legend: T trials of the grid.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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

_Fit = Callable[[Hyperparameters, str, int], tuple[nn.Module, Accuracy] | None]
"""Of a training's parameters, its name, and the steps before it: a network and its accuracy; None if it diverged."""


def grid_search(
    evaluation: Evaluation,
    folder: Path,
    data: LabelledData,
    trials: Sequence[Hyperparameters],
    *,
    metric: Metric,
    epochs: int | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Try all on a part of train, choose, train on all of train, test on val, once.

    What is finished is kept in the evaluation's folder, so that a killed search goes on with the trial that it was at.
    trials: [T], which differ in learning rate and weight decay; with one of them, nothing is held out. metric: what
    chooses. epochs, steps: either.
    Returns top1, top5, mean_per_class (percent), lr and weight_decay (the chosen ones), grid (each trial and what it
    reached on the held-out images, None where it diverged), holdout_images, steps, unreadable_images, and what
    describes the data. Raises ValueError if every trial diverged, or if train is smaller than a batch; PausedError.
    """
    ranks, precision, chosen = evaluation.ranks, evaluation.options.precision, trials[0]

    @contextmanager
    def fitting(train: Split, test: Split) -> Iterator[tuple[_Fit, int, EvaluationLoaders]]:
        """What trains and tests a network on these images, and in how many steps."""
        with evaluation.loaders(train, trials[0].batch_size, trials[0].seed) as loaders:
            loader = loaders.random_crops(train, loaders.train_order(train))
            images = loaders.center_crops(test)
            total_steps = steps or (epochs or 0) * loader.steps_per_epoch
            with evaluation.display(total_steps) as display:

                def fit(parameters: Hyperparameters, name: str, steps_before: int) -> tuple[nn.Module, Accuracy] | None:
                    display.say(f"{name}: learning rate {parameters.lr:g}, weight decay {parameters.weight_decay:g}")
                    stepper = evaluation.stepper(folder, name, total_steps, loader.steps_per_epoch, steps_before)
                    network = fine_tune(
                        evaluation.pretrained.backbone,
                        len(train.classes),
                        loader,
                        parameters,
                        stepper,
                        precision=precision,
                        ranks=ranks,
                        display=display,
                    )
                    if network is None:
                        return None
                    return network, accuracy(*extract_features(network, images, precision, ranks, normalized=False))

                yield fit, total_steps, loaders

    grid: list[dict[str, Any]] = []
    num_held_out = steps_before = 0
    if len(trials) > 1:
        rest, held_out = hold_out_to_choose(data.train, chosen.seed)
        num_held_out = len(held_out)
        with fitting(rest, held_out) as (fit, total_steps, _):
            for number, trial in enumerate(trials, start=1):
                name = f"trial-{number:03}"
                file = folder / f"{name}.json"
                found = ranks.from_main(read_json(file, dict[str, Any]) if ranks.is_main and file.is_file() else None)
                if found is None:
                    fitted = fit(trial, name, steps_before)
                    score = None if fitted is None else getattr(fitted[1], metric)
                    found = {"lr": trial.lr, "weight_decay": trial.weight_decay, f"holdout_{metric}": score}
                    if ranks.is_main:
                        write_json(file, found)
                        shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
                grid.append(found)
                steps_before += total_steps
        scores = [entry[f"holdout_{metric}"] for entry in grid]
        good = [score for score in scores if score is not None]
        if not good:
            raise ValueError(
                "the loss became infinite or NaN with every setting of the grid; give lower learning rates"
            )
        chosen = trials[scores.index(max(good))]
    with fitting(data.train, data.val) as (fit, total_steps, loaders):
        fitted = fit(chosen, "final", steps_before)
        if fitted is None:
            raise ValueError(
                f"the loss became infinite or NaN with learning rate {chosen.lr:g} and weight decay "
                f"{chosen.weight_decay:g}; give a lower learning rate"
            )
        evaluation.save(folder / "network.safetensors", fitted[0].state_dict())
        return {
            **asdict(fitted[1]),
            "metric": metric,
            "lr": chosen.lr,
            "weight_decay": chosen.weight_decay,
            "grid": grid or None,
            "holdout_images": num_held_out,
            "steps": total_steps,
            "unreadable_images": loaders.unreadable_images(),
            **data.describe(),
        }
