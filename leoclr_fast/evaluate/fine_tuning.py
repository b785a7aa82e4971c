"""Fine-tuning a whole network on labelled images, as `finetune` and `transfer` have it in common: one training, from a
backbone to a classifier, and a grid of hyperparameters tried on a held-out part of train.

Legend: B images of this rank, C classes, T trials of the grid.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from dataset_tools.schema import read_json
from dataset_tools.sources import Split
from leoclr_fast.evaluate.accuracy import Accuracy, accuracy
from leoclr_fast.evaluate.data import EvaluationLoaders, LabelledData, hold_out_to_choose
from leoclr_fast.evaluate.evaluation import Evaluation
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.protocols import Metric
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.folder import write_json
from leoclr_fast.run.stepper import Stepper, endless
from leoclr_fast.schedules import learning_rate
from pipelines.augment import augmented_views
from pipelines.loader import Loader

_CLASSIFIER_STD = 0.01  # as MoCo's


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Of one fine-tuning: SGD with Nesterov momentum 0.9 and cosine decay to the end of its stepper."""

    lr: float
    weight_decay: float
    """Not on batch-norm."""
    batch_size: int
    batchnorm_momentum: float | None = 0.1
    """Of the running statistics, as torch counts: the weight of the newest batch. None: as `TransferProtocol` says."""
    seed: int = 0
    """Draws the classifier's first weights."""


def fine_tune(
    backbone: ResNet,
    num_classes: int,
    loader: Loader,
    parameters: Hyperparameters,
    stepper: Stepper,
    precision: str,
) -> ResNet | None:
    """A copy of the backbone, trained with a classifier, from the checkpoint on if there is one; None if it diverged.

    The ranks have a batch-norm each; gradients are means over the global batch, running statistics over the ranks.
    Raises as `Stepper.steps`.
    """
    device, ranks = loader.device, stepper.ranks
    network = deepcopy(backbone)
    network.fc = new_classifier(network.feature_dim, num_classes, parameters.seed)
    network.to(device, encoder_dtype(precision)).to(memory_format=torch.channels_last).requires_grad_(True).train()
    weights = list(network.parameters())
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    for norm in batchnorms(network):
        norm.momentum = parameters.batchnorm_momentum or min(10 / loader.steps_per_epoch, 0.1)
    groups = decay_groups(network, parameters.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=parameters.lr, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    share = ranks.local_size(parameters.batch_size) / parameters.batch_size  # of the global batch, on this rank
    epoch_loss = torch.zeros((), dtype=torch.float64, device=device)
    trained: dict[str, Any] = {"network": network, "optimizer": optimizer, "scaler": scaler}
    saved = stepper.load()
    if saved is not None:
        for name, part in trained.items():
            part.load_state_dict(saved[name])
        if ranks.is_main:
            epoch_loss.copy_(saved["epoch_loss"])

    def state() -> dict[str, Any]:
        loss = epoch_loss.clone()
        ranks.all_reduce_sum([loss])
        return {**{name: part.state_dict() for name, part in trained.items()}, "epoch_loss": loss}

    for batch in stepper.steps(lambda step: endless(loader.batches, loader.steps_per_epoch, step), state):
        # ---- a single training step ---------------------------------------------------------------------------------
        if batch.step == 0:
            epoch_loss.zero_()
        lr = learning_rate("cosine_per_step", parameters.lr, stepper.step, stepper.total_steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        (images,) = augmented_views(
            batch, loader.views, loader.view_config, seed=loader.seed, dtype=encoder_dtype(precision)
        )  # [B, 3, S, S]
        labels = batch.labels.to(device, non_blocking=True)
        with encoder_precision(precision, device):
            scores = network(images)  # [B, C]
        wide = scores if scores.dtype == torch.float64 else scores.float()
        loss = F.cross_entropy(wide, labels) * share

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if ranks.world_size > 1:
            torch._foreach_mul_(statistics, share)
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            ranks.all_reduce_sum([*gradients, *statistics])
        scaler.step(optimizer)
        scaler.update()
        epoch_loss += loss.detach().double()
        # ---- end of the step ----------------------------------------------------------------------------------------
        if batch.step + 1 == loader.steps_per_epoch or stepper.step + 1 == stepper.total_steps:
            mean_loss = epoch_loss / (batch.step + 1)
            ranks.all_reduce_sum([mean_loss])
            stepper.show(batch.epoch, float(mean_loss), lr, parameters.batch_size)
            if not math.isfinite(mean_loss):
                return None
    return network


def new_classifier(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """Weights of a normal distribution, drawn by the seed, and no bias."""
    classifier = nn.Linear(num_features, num_classes)
    nn.init.normal_(classifier.weight, std=_CLASSIFIER_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def batchnorms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: batch-norm's scales and shifts without weight decay, all other parameters with it."""
    undecayed = [parameter for norm in batchnorms(network) for parameter in norm.parameters()]
    ids = {id(parameter) for parameter in undecayed}
    decayed = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


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
        with evaluation.loaders(train, chosen.batch_size, chosen.seed) as loaders:
            loader = loaders.random_crops(train, loaders.train_order(train))
            images = loaders.center_crops(test)
            total_steps = steps or (epochs or 0) * loader.steps_per_epoch
            display = loaders.enter_context(evaluation.display(total_steps))

            def fit(parameters: Hyperparameters, name: str, steps_before: int) -> tuple[nn.Module, Accuracy] | None:
                display.say(f"{name}: learning rate {parameters.lr:g}, weight decay {parameters.weight_decay:g}")
                stepper = evaluation.stepper(folder / name, total_steps, loader.steps_per_epoch, display, steps_before)
                backbone, num_classes = evaluation.pretrained.backbone, len(train.classes)
                network = fine_tune(backbone, num_classes, loader, parameters, stepper, precision)
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
