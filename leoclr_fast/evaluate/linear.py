"""Linear classification of frozen features: `leoclr-fast linear`.

Legend: G classifiers (learning rates), B images of a global batch, N images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dataset_tools.files import write_file
from dataset_tools.sources import Split
from dataset_tools.splits import hold_out
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.data import LabelledData, open_labelled_data
from leoclr_fast.evaluate.evaluation import (
    Evaluation,
    Result,
    data_settings,
    evaluation_ranks,
    evaluation_views,
    open_evaluation,
    require_real_images,
)
from leoclr_fast.evaluate.features import encode_batch, extract_features
from leoclr_fast.evaluate.linear_classifiers import LinearClassifiers
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.run.stepper import Stepper, endless
from leoclr_fast.run.telemetry import ProgressDisplay
from leoclr_fast.weights.backbone_file import weights_sha256
from leoclr_fast.weights.pretrained import load_pretrained
from pipelines.config import ViewConfig
from pipelines.order import TrainOrder

Batches = Callable[[int, int], Iterable[Any]]
"""An epoch and a step of it → the batches from there to its end."""
Encode = Callable[[Any], tuple[Tensor, Tensor]]
"""A batch → features [B, D] and labels [B] of the global batch, the same on every rank."""


class BackboneChangedError(RuntimeError):
    """A frozen backbone is not what it was: a fault of ours, and the result is void."""


def run(
    weights: Path, data: Path, protocol: LinearProtocol, options: TrainingOptions, *, console: Console | None = None
) -> Result:
    """Linear classification on a run's frozen backbone, or on that of a file of weights.

    Returns top1, top5 and mean_per_class (percent, on val, of the last epoch), lr (the chosen one), grid (what each
    learning rate reached on the images held out of train; None where its loss was not finite), the checksums of the
    backbone before and after, and what it was made of. The evaluator is named linear_cached_features where it is the
    quick estimate.
    Raises ValueError for what the user can mend, BackboneChangedError if the backbone did not stay as it was.
    """
    require_real_images(options.loader)
    with evaluation_ranks(options) as (options, ranks, device), ExitStack() as stack:
        pretrained = load_pretrained(weights, untrained=options.untrained)
        labelled = open_labelled_data(data, holdout_seed=pretrained.holdout_seed, max_images=options.max_images)
        views = evaluation_views(pretrained, protocol.crop_scale, options.image_size)
        settings = {
            **as_plain(protocol),
            "lr_drops": protocol.lr_drops,
            **data_settings(options, views, labelled.fingerprint),
        }
        name = "linear_cached_features" if protocol.cached_features else "linear"
        evaluation = stack.enter_context(open_evaluation(name, settings, pretrained, ranks, device, options))
        return evaluation.result(lambda: _evaluate(evaluation, labelled, views, protocol, options, console))


def _evaluate(
    evaluation: Evaluation,
    labelled: LabelledData,
    views: ViewConfig,
    protocol: LinearProtocol,
    options: TrainingOptions,
    console: Console | None,
) -> dict[str, Any]:
    ranks, device, dtype = evaluation.ranks, evaluation.device, encoder_dtype(options.precision)
    backbone = evaluation.pretrained.backbone.to(device, dtype).to(memory_format=torch.channels_last)
    freeze(backbone)
    before = weights_sha256(backbone.state_dict())
    train, held_out = labelled.train, None
    if protocol.lr_grid:
        train, held_out = hold_out(train, min(protocol.holdout_images, max(1, len(train) // 10)), protocol.seed)
        if not len(held_out):
            raise ValueError(
                f"{labelled.path} has no class of two images or more, so none can be held out to choose from "
                "--lr-grid; give one --lr"
            )
    with evaluation.loaders(train, views, protocol.batch_size, protocol.seed) as loaders:
        order = loaders.train_order(train, keep_incomplete=True)

        def features_of(split: Split) -> tuple[Tensor, Tensor]:
            return extract_features(backbone, loaders.center_crops(split), options.precision, ranks, normalized=False)

        batches: Batches
        encode: Encode
        if protocol.cached_features:
            batches, encode = _cached_features(*features_of(train), order)
        else:
            loader = loaders.random_crops(train, order)
            batches, encode = (
                loader.batches,
                lambda batch: encode_batch(backbone, batch, loader, options.precision, ranks),
            )
        classifiers = LinearClassifiers(
            protocol.lrs,
            backbone.feature_dim,
            len(train.classes),
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            seed=protocol.seed,
            device=device,
            dtype=dtype,
        )
        total_steps = protocol.epochs * order.steps_per_epoch
        with evaluation.display(console, total_steps) as display:
            display.say(_headline(evaluation, labelled.note, len(train), held_out, protocol))
            stepper = evaluation.stepper("training", total_steps, order.steps_per_epoch)
            losses = _train(classifiers, batches, encode, order, protocol, stepper, display)
        grid = _grid(classifiers, losses, None if held_out is None else features_of(held_out))
        chosen = _choose(grid, protocol)
        features, labels = features_of(labelled.val)
        found = accuracy(F.linear(features, classifiers.weight[chosen], classifiers.bias[chosen]), labels)
        after = weights_sha256(backbone.state_dict())
        if after != before:
            raise BackboneChangedError(f"the frozen backbone changed during linear evaluation: {before} to {after}")
        if ranks.is_main:
            tensors = {"fc.weight": classifiers.weight[chosen], "fc.bias": classifiers.bias[chosen]}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_file(evaluation.path / "classifier.safetensors", save(tensors))
        return {
            **asdict(found),
            "lr": protocol.lrs[chosen],
            "grid": grid if protocol.lr_grid else None,
            "holdout_images": 0 if held_out is None else len(held_out),
            "estimate": protocol.cached_features,
            "train_loss": losses[chosen],
            **evaluation.pretrained.describe(),
            "backbone_sha256_before": before,
            "backbone_sha256_after": after,
            **labelled.describe(),
            "unreadable_images": loaders.unreadable_images(),
            "world_size": ranks.world_size,
        }


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode: batch-norm neither learns nor counts."""
    backbone.requires_grad_(False)
    backbone.eval()


def _cached_features(features: Tensor, labels: Tensor, order: TrainOrder) -> tuple[Batches, Encode]:
    """Batches of features [N, D] that were computed once: N * D * 4 bytes on the device (10.5 GB for ImageNet,
    ResNet-50).
    """
    device = features.device
    labels = labels.to(device)

    def batches(epoch: int, start_step: int) -> Iterable[Tensor]:
        for step in range(start_step, order.steps_per_epoch):
            yield torch.from_numpy(order.global_indices(epoch, step).copy())

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(device)
        return features[rows], labels[rows]

    return batches, encode


def _train(
    classifiers: LinearClassifiers,
    batches: Batches,
    encode: Encode,
    order: TrainOrder,
    protocol: LinearProtocol,
    stepper: Stepper,
    display: ProgressDisplay,
) -> list[float]:
    """All epochs, from the checkpoint on if there is one; returns the mean losses of the last epoch: [G].

    All ranks see the features of all, and take the same step. Raises as `Stepper.steps`.
    """
    steps_per_epoch = order.steps_per_epoch
    epoch_losses = torch.zeros(len(protocol.lrs), dtype=torch.float64, device=classifiers.weight.device)
    saved = stepper.load()
    if saved is not None:
        classifiers.load_state_dict(saved["classifiers"])
        epoch_losses.copy_(saved["epoch_losses"])

    def state() -> dict[str, Any]:
        return {"classifiers": classifiers.state_dict(), "epoch_losses": epoch_losses}

    for batch in stepper.steps(lambda step: endless(batches, steps_per_epoch, step), state):
        # ---- a single training step ---------------------------------------------------------------------------------
        epoch, step_in_epoch = divmod(stepper.step, steps_per_epoch)
        if step_in_epoch == 0:
            epoch_losses.zero_()
        features, labels = encode(batch)
        factor = protocol.lr_factor(epoch)
        epoch_losses += classifiers.step(features, labels, factor).double() / steps_per_epoch
        # ---- end of the step ----------------------------------------------------------------------------------------
        if step_in_epoch + 1 == steps_per_epoch:
            finite = [pair for pair in zip(epoch_losses.tolist(), protocol.lrs, strict=True) if math.isfinite(pair[0])]
            loss, lr = min(finite, default=(math.nan, protocol.lrs[0]))
            stepper.show(display, epoch, loss, lr * factor, protocol.batch_size)
    return epoch_losses.tolist()


def _grid(
    classifiers: LinearClassifiers, losses: list[float], held_out: tuple[Tensor, Tensor] | None
) -> list[dict[str, float | None]]:
    """Each learning rate with its accuracy on what was held out of train; None where it came to nothing.

    held_out: features [N, D] and labels [N].
    """
    scores: list[float | None] = [None] * len(losses)
    if held_out is not None:
        features, labels = held_out
        logits = torch.cat([classifiers.logits(part).cpu() for part in features.split(4096)], dim=1)  # [G, N, C]
        scores = [accuracy(own, labels).top1 for own in logits]
    finite = [
        math.isfinite(loss) and bool(weight.isfinite().all())
        for loss, weight in zip(losses, classifiers.weight, strict=True)
    ]
    return [
        {"lr": lr, "holdout_top1": score if good else None, "train_loss": loss if good else None}
        for lr, score, loss, good in zip(classifiers.lrs, scores, losses, finite, strict=True)
    ]


def _choose(grid: list[dict[str, float | None]], protocol: LinearProtocol) -> int:
    """The best on the held-out images; of equals the lower training loss. Raises ValueError if all diverged."""
    good = [index for index, entry in enumerate(grid) if entry["train_loss"] is not None]
    if not good:
        tried = " ".join(f"{lr:g}" for lr in protocol.lrs)
        raise ValueError(f"the loss became infinite or NaN with every learning rate ({tried}); give a lower --lr")
    return max(good, key=lambda index: (grid[index]["holdout_top1"] or 0.0, -(grid[index]["train_loss"] or 0.0)))


def _headline(
    evaluation: Evaluation, note: str, num_images: int, held_out: Split | None, protocol: LinearProtocol
) -> str:
    rates = ", ".join(f"{lr:g}" for lr in protocol.lrs)
    chosen_on = f", chosen on {len(held_out):,} images held out of train" if held_out is not None else ""
    kind = "a quick estimate on cached centre-crop features" if protocol.cached_features else "MoCo-v2's protocol"
    line = f"{evaluation.name} ({kind}) of {evaluation.pretrained.origin}: {num_images:,} images"
    line += f", {protocol.epochs} epochs, learning rate {rates}{chosen_on}"
    return f"{line}\n{note}" if note else line
