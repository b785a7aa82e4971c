"""Linear classification of frozen features: `leoclr-fast linear`.

Legend: G classifiers (learning rates), B images of a global batch, N images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from dataset_tools.sources import Split
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.data import LabelledData, hold_out_to_choose, open_labelled_data
from leoclr_fast.evaluate.evaluation import Evaluation, evaluation_of
from leoclr_fast.evaluate.features import encode_batch, extract_features
from leoclr_fast.evaluate.fine_tuning import new_classifier
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.run.stepper import Stepper, endless
from leoclr_fast.weights.backbone_file import weights_sha256
from pipelines.order import TrainOrder

Batches = Callable[[int, int], Iterable[Any]]
"""An epoch and a step of it → the batches from there to its end."""
Encode = Callable[[Any], tuple[Tensor, Tensor]]
"""A batch → features [B, D] and labels [B] of the global batch, the same on every rank."""


def run(
    weights: Path, data: Path, protocol: LinearProtocol, options: TrainingOptions, *, console: Console | None = None
) -> dict[str, Any]:
    """Linear classification on a run's frozen backbone, or on that of a file of weights.

    Returns top1, top5 and mean_per_class (percent, on val, of the last epoch), lr (the chosen one), grid (what each
    learning rate reached on the images held out of train; None where its loss was not finite), the checksums of the
    backbone before and after, what it was made of, and as `Evaluation.result`. The evaluator is named
    linear_cached_features where it is the quick estimate.
    Raises ValueError for what the user can mend, RuntimeError if the backbone did not stay as it was.
    """
    with evaluation_of(weights, options, console) as evaluation:
        holdout_seed = evaluation.pretrained.holdout_seed
        labelled = open_labelled_data(data, holdout_seed=holdout_seed, max_images=options.max_images)
        settings = as_plain(protocol) | {"lr_drops": protocol.lr_drops}
        return evaluation.result(
            "linear_cached_features" if protocol.cached_features else "linear",
            settings | evaluation.view_settings(labelled.fingerprint),
            lambda folder: _evaluate(evaluation, folder, labelled, protocol),
        )


def _evaluate(evaluation: Evaluation, folder: Path, labelled: LabelledData, protocol: LinearProtocol) -> dict[str, Any]:
    ranks, device, precision = evaluation.ranks, evaluation.device, evaluation.options.precision
    backbone = evaluation.frozen_backbone()
    before = weights_sha256(backbone.state_dict())
    train, held_out = labelled.train, None
    if protocol.lr_grid:
        train, held_out = hold_out_to_choose(train, protocol.seed)
    with evaluation.loaders(train, protocol.batch_size, protocol.seed) as loaders:
        order = loaders.train_order(train, keep_incomplete=True)

        def features_of(split: Split) -> tuple[Tensor, Tensor]:
            return extract_features(backbone, loaders.center_crops(split), precision, ranks, normalized=False)

        batches: Batches
        encode: Encode
        if protocol.cached_features:
            batches, encode = _cached(*features_of(train), order)
        else:
            loader = loaders.random_crops(train, order)
            batches, encode = loader.batches, lambda batch: encode_batch(backbone, batch, loader, precision, ranks)
        num_classes, dtype = len(train.classes), encoder_dtype(precision)
        heads = [
            new_classifier(backbone.feature_dim, num_classes, protocol.seed).to(device, dtype) for _ in protocol.lrs
        ]
        total_steps = protocol.epochs * order.steps_per_epoch
        with evaluation.display(total_steps) as display:
            rates = ", ".join(f"{lr:g}" for lr in protocol.lrs)
            chosen_on = f", chosen on {len(held_out):,} images held out of train" if held_out is not None else ""
            kind = "an estimate on cached centre-crop features" if protocol.cached_features else "MoCo-v2's protocol"
            display.say(
                f"linear ({kind}) of {evaluation.pretrained.origin}: {len(train):,} images, {protocol.epochs} epochs, "
                f"learning rate {rates}{chosen_on}\n{labelled.note}".rstrip()
            )
            stepper = evaluation.stepper(folder / "training", total_steps, order.steps_per_epoch, display)
            losses = train_heads(heads, batches, encode, order.steps_per_epoch, protocol, stepper)
        grid = _grid(heads, losses, protocol, None if held_out is None else features_of(held_out))
        good = [index for index, entry in enumerate(grid) if entry["train_loss"] is not None]
        if not good:
            tried = " ".join(f"{lr:g}" for lr in protocol.lrs)
            raise ValueError(f"the loss became infinite or NaN with every learning rate ({tried}); give a lower --lr")
        # The best on the held-out images; of equals the lower training loss.
        chosen = max(good, key=lambda index: (grid[index]["holdout_top1"] or 0.0, -losses[index]))
        features, labels = features_of(labelled.val)
        head = heads[chosen]
        with torch.no_grad():
            found = accuracy(head(features), labels)
        after = weights_sha256(backbone.state_dict())
        if after != before:
            raise RuntimeError(f"the frozen backbone changed during linear evaluation: {before} to {after}")
        evaluation.save(folder / "classifier.safetensors", {"fc.weight": head.weight, "fc.bias": head.bias})
        return {
            **asdict(found),
            "lr": protocol.lrs[chosen],
            "grid": grid if protocol.lr_grid else None,
            "holdout_images": 0 if held_out is None else len(held_out),
            "estimate": protocol.cached_features,
            "train_loss": losses[chosen],
            "backbone_sha256_before": before,
            "backbone_sha256_after": after,
            **labelled.describe(),
            "unreadable_images": loaders.unreadable_images(),
        }


def _cached(features: Tensor, labels: Tensor, order: TrainOrder) -> tuple[Batches, Encode]:
    """Batches of features [N, D] that were computed once: N * D * 4 bytes on the device (10.5 GB for ImageNet,
    ResNet-50).
    """
    labels = labels.to(features.device)

    def batches(epoch: int, start_step: int) -> Iterable[Tensor]:
        for step in range(start_step, order.steps_per_epoch):
            yield torch.from_numpy(order.global_indices(epoch, step).copy()).to(features.device)

    return batches, lambda rows: (features[rows], labels[rows])


def train_heads(
    heads: list[nn.Linear],
    batches: Batches,
    encode: Encode,
    steps_per_epoch: int,
    protocol: LinearProtocol,
    stepper: Stepper,
) -> list[float]:
    """All epochs, from the checkpoint on if there is one; returns the mean losses of the last epoch: [G].

    No head sees the others. All ranks see the features of all, and take the same step. Raises as `Stepper.steps`.
    """
    device = heads[0].weight.device
    optimizer = torch.optim.SGD(
        [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, protocol.lrs, strict=True)],
        momentum=0.9,
        weight_decay=protocol.weight_decay,
    )
    epoch_losses = torch.zeros(len(heads), dtype=torch.float64, device=device)
    saved = stepper.load()
    if saved is not None:
        for head, own in zip(heads, saved["heads"], strict=True):
            head.load_state_dict(own)
        optimizer.load_state_dict(saved["optimizer"])
        epoch_losses.copy_(saved["epoch_losses"])

    def state() -> dict[str, Any]:
        states = [head.state_dict() for head in heads]
        return {"heads": states, "optimizer": optimizer.state_dict(), "epoch_losses": epoch_losses}

    for batch in stepper.steps(lambda step: endless(batches, steps_per_epoch, step), state):
        # ---- a single training step ---------------------------------------------------------------------------------
        epoch, step_in_epoch = divmod(stepper.step, steps_per_epoch)
        if step_in_epoch == 0:
            epoch_losses.zero_()
        features, labels = encode(batch)
        factor = protocol.lr_factor(epoch)
        for group, lr in zip(optimizer.param_groups, protocol.lrs, strict=True):
            group["lr"] = factor * lr
        losses = torch.stack([F.cross_entropy(head(features), labels) for head in heads])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        epoch_losses += losses.detach().double() / steps_per_epoch
        # ---- end of the step ----------------------------------------------------------------------------------------
        if step_in_epoch + 1 == steps_per_epoch:
            finite = [pair for pair in zip(epoch_losses.tolist(), protocol.lrs, strict=True) if math.isfinite(pair[0])]
            loss, lr = min(finite, default=(math.nan, protocol.lrs[0]))
            stepper.show(epoch, loss, lr * factor, protocol.batch_size)
    return epoch_losses.tolist()


@torch.no_grad()
def _grid(
    heads: list[nn.Linear], losses: list[float], protocol: LinearProtocol, held_out: tuple[Tensor, Tensor] | None
) -> list[dict[str, float | None]]:
    """Each learning rate with its accuracy on what was held out of train; None where it came to nothing.

    held_out: features [N, D] and labels [N].
    """
    grid: list[dict[str, float | None]] = []
    for lr, head, loss in zip(protocol.lrs, heads, losses, strict=True):
        good = math.isfinite(loss) and all(bool(tensor.isfinite().all()) for tensor in head.parameters())
        score = None if held_out is None or not good else accuracy(head(held_out[0]), held_out[1]).top1
        grid.append({"lr": lr, "holdout_top1": score, "train_loss": loss if good else None})
    return grid
