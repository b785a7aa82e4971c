"""Linear classification of frozen features: `leoclr-fast linear`.

Legend: G classifiers (learning rates), B images of a global batch, N images, D features, C classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dataset_tools.sources import Split
from dataset_tools.splits import hold_out
from dataset_tools.stop_signals import StoppedBySignalError, stop_signals
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.evaluation_folder import Checkpoints, EvaluationFolder, PausedError, evaluation_folder
from leoclr_fast.evaluate.features import encode_batch, extract_features
from leoclr_fast.evaluate.labelled_data import open_labelled_data
from leoclr_fast.evaluate.linear_classifiers import LinearClassifiers
from leoclr_fast.evaluate.loaders import EvaluationLoaders
from leoclr_fast.evaluate.options import EvaluationOptions
from leoclr_fast.evaluate.progress import EvaluationProgress
from leoclr_fast.evaluate.protocols import LinearProtocol
from leoclr_fast.evaluate.subject import freeze, load_subject, require_real_images, view_settings
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.run.folder import write_atomically
from leoclr_fast.run.telemetry import TrainingClock
from leoclr_fast.weights.backbone_file import weights_sha256
from pipelines.factory import settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder

log = logging.getLogger(__name__)


class BackboneChangedError(RuntimeError):
    """A frozen backbone is not what it was: a fault of ours, and the result is void."""


def run_linear(
    weights: Path,
    data: Path,
    protocol: LinearProtocol,
    options: EvaluationOptions,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Linear classification on a run's frozen backbone, or on that of a file of weights.

    Returns top1, top5 and mean_per_class (percent, on val, of the last epoch), lr (the chosen one), grid (what each
    learning rate reached on the images held out of train; None where its loss was not finite), the checksums of the
    backbone before and after, and what it was made of; an empty dict on ranks other than the first. The evaluator is
    named linear_cached_features where it is the quick estimate. Where options.max_steps ended it: the document of
    `PausedError`.
    Raises ValueError for what the user can mend, BackboneChangedError if the backbone did not stay as it was.
    """
    speed, max_images = options.speed, options.max_images
    require_real_images(speed.loader)
    with process_group(speed.device) as (ranks, device), ExitStack() as stack:
        subject = load_subject(weights, untrained=options.untrained)
        labelled = open_labelled_data(data, holdout_seed=subject.holdout_seed, max_images=max_images)
        views = subject.view_config(protocol.crop_scale, options.image_size)
        settings = {
            **as_plain(protocol),
            "lr_drops": protocol.lr_drops,
            **view_settings(views),
            "precision": speed.precision,
            "data_fingerprint": labelled.fingerprint,
            "max_images": max_images,
        }
        evaluator = "linear_cached_features" if protocol.cached_features else "linear"
        folder = stack.enter_context(evaluation_folder(evaluator, settings, subject, options, ranks))
        if folder.finished is not None:
            return folder.finished if ranks.is_main else {}

        backbone = subject.backbone.to(device, encoder_dtype(speed.precision)).to(memory_format=torch.channels_last)
        freeze(backbone)
        before = weights_sha256(backbone.state_dict())
        train, held_out = labelled.train, None
        if protocol.lr_grid:
            train, held_out = hold_out(train, min(protocol.holdout_images, max(1, len(train) // 10)), protocol.seed)
            if not len(held_out):
                raise ValueError(
                    f"{data} has no class of two images or more, so none can be held out to choose from --lr-grid; "
                    "give one --lr"
                )
        loaders = stack.enter_context(
            EvaluationLoaders(
                views=views,
                config=settle_loader(train, speed.loader, device),
                batch_size=protocol.batch_size,
                seed=protocol.seed,
                device=device,
                ranks=ranks,
            )
        )
        order = loaders.train_order(train, keep_incomplete=True)
        batches: _LiveFeatures | _CachedFeatures
        if protocol.cached_features:
            crops = loaders.center_crops(train)
            batches = _CachedFeatures(
                *extract_features(backbone, crops, speed.precision, ranks, normalized=False), order
            )
        else:
            batches = _LiveFeatures(backbone, loaders.random_crops(train, order), speed.precision, ranks)
        classifiers = LinearClassifiers(
            protocol.lrs,
            backbone.feature_dim,
            len(labelled.classes),
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            seed=protocol.seed,
            device=device,
            dtype=encoder_dtype(speed.precision),
        )
        total_steps = protocol.epochs * order.steps_per_epoch
        display = EvaluationProgress(console, total_steps, enabled=ranks.is_main)
        stack.callback(display.close)
        display.say(_headline(evaluator, subject.weights, labelled.note, len(train), held_out, protocol))
        checkpoints = folder.checkpoints("training")
        try:
            losses = _train(classifiers, batches, order, protocol, checkpoints, display, ranks, device)
        except PausedError as paused:
            return paused.document if ranks.is_main else {}

        grid = _grid(
            classifiers,
            losses,
            loaders.center_crops(held_out) if held_out is not None else None,
            backbone,
            speed.precision,
            ranks,
        )
        chosen = _choose(grid, protocol)
        features, labels = extract_features(
            backbone, loaders.center_crops(labelled.val), speed.precision, ranks, normalized=False
        )
        found = accuracy(F.linear(features, classifiers.weight[chosen], classifiers.bias[chosen]), labels)
        after = weights_sha256(backbone.state_dict())
        if after != before:
            raise BackboneChangedError(f"the frozen backbone changed during linear evaluation: {before} to {after}")
        result = {
            **asdict(found),
            "lr": protocol.lrs[chosen],
            "grid": grid if protocol.lr_grid else None,
            "holdout_images": len(held_out) if held_out is not None else 0,
            "estimate": protocol.cached_features,
            "train_loss": losses[chosen],
            **subject.describe(),
            "backbone_sha256_before": before,
            "backbone_sha256_after": after,
            **labelled.describe(),
            "unreadable_images": loaders.unreadable_images(),
            "world_size": ranks.world_size,
            "note": labelled.note,
        }
        if ranks.is_main:
            _save_classifier(folder, classifiers, chosen)
        document = folder.finish(result, device)
        checkpoints.delete()
        return document


@dataclass(frozen=True, slots=True)
class _LiveFeatures:
    """Features of random crops, computed as they are asked for."""

    backbone: nn.Module
    loader: Loader
    precision: str
    ranks: Ranks

    def batches(self, epoch: int, start_step: int, clock: TrainingClock) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [B, D], labels [B]) of the global batches that follow, the same on every rank."""
        for batch in clock.timed(self.loader.batches(epoch, start_step)):
            yield encode_batch(self.backbone, batch, self.loader, self.precision, self.ranks)


@dataclass(frozen=True, slots=True)
class _CachedFeatures:
    """Features of centre crops, computed once: N * D * 4 bytes on the device (10.5 GB for ImageNet, ResNet-50)."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N]
    order: TrainOrder

    def batches(self, epoch: int, start_step: int, _clock: TrainingClock) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [B, D], labels [B]) of the global batches that follow, the same on every rank."""
        device = self.features.device
        labels = self.labels.to(device)
        for step in range(start_step, self.order.steps_per_epoch):
            rows = torch.from_numpy(self.order.global_indices(epoch, step).copy()).to(device)
            yield self.features[rows], labels[rows]


def _train(
    classifiers: LinearClassifiers,
    source: _LiveFeatures | _CachedFeatures,
    order: TrainOrder,
    protocol: LinearProtocol,
    checkpoints: Checkpoints,
    display: EvaluationProgress,
    ranks: Ranks,
    device: torch.device,
) -> list[float]:
    """All epochs, from the checkpoint on if there is one; returns the mean losses of the last epoch: [G].

    All ranks see the features of all, and take the same step. Raises PausedError, or StoppedBySignalError on SIGINT and
    SIGTERM, after a checkpoint.
    """
    steps_per_epoch = order.steps_per_epoch
    total_steps = protocol.epochs * steps_per_epoch
    step, epoch_losses = 0, torch.zeros(len(protocol.lrs), dtype=torch.float64, device=device)
    saved = checkpoints.load(device)
    if saved is not None:
        step = saved["step"]
        classifiers.load_state_dict(saved["classifiers"])
        epoch_losses.copy_(saved["epoch_losses"])

    def state() -> dict[str, Any]:
        return {"classifiers": classifiers.state_dict(), "epoch_losses": epoch_losses}

    clock = TrainingClock(step)
    with stop_signals(enabled=ranks.world_size == 1) as stop:
        to_come = max(0, checkpoints.last_step(total_steps) - step)
        batches = islice(_from_step(source, step, steps_per_epoch, clock), to_come)
        for features, labels in batches:
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            if step_in_epoch == 0:
                epoch_losses.zero_()
            factor = protocol.lr_factor(epoch)
            epoch_losses += classifiers.step(features, labels, factor).double() / steps_per_epoch
            step += 1
            if step % steps_per_epoch == 0:
                _show(display, step, epoch, epoch_losses, protocol, clock, factor)
                checkpoints.save(step, state, due=step == total_steps)
            if stop.requested and step < total_steps:
                checkpoints.save(step, state)
                raise StoppedBySignalError(
                    f"stopped by {stop.name} after step {step} of {total_steps}; the same command continues from there"
                )
    if step < total_steps:
        checkpoints.pause(step, state)
    return epoch_losses.tolist()


def _from_step(
    source: _LiveFeatures | _CachedFeatures, step: int, steps_per_epoch: int, clock: TrainingClock
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all epochs to come, from the one that follows `step` finished steps."""
    first_epoch, start_step = divmod(step, steps_per_epoch)
    for epoch in count(first_epoch):
        yield from source.batches(epoch, start_step if epoch == first_epoch else 0, clock)


def _show(
    display: EvaluationProgress,
    step: int,
    epoch: int,
    losses: Tensor,
    protocol: LinearProtocol,
    clock: TrainingClock,
    factor: float,
) -> None:
    finite = [(loss, lr) for loss, lr in zip(losses.tolist(), protocol.lrs, strict=True) if math.isfinite(loss)]
    loss, lr = min(finite, default=(math.nan, protocol.lrs[0]))
    display.update(step, epoch, loss, lr * factor, protocol.batch_size, clock)


def _grid(
    classifiers: LinearClassifiers,
    losses: list[float],
    held_out: Loader | None,
    backbone: nn.Module,
    precision: str,
    ranks: Ranks,
) -> list[dict[str, float | None]]:
    """Each learning rate with its accuracy on what was held out of train; None where it came to nothing."""
    scores: list[float | None] = [None] * len(losses)
    if held_out is not None:
        features, labels = extract_features(backbone, held_out, precision, ranks, normalized=False)
        scores = [accuracy(logits, labels).top1 for logits in _scores(classifiers, features)]
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


def _scores(classifiers: LinearClassifiers, features: Tensor) -> Tensor:
    """The logits of features [N, D], a part at a time: [G, N, C] on the host."""
    return torch.cat([classifiers.logits(part).cpu() for part in features.split(4096)], dim=1)


def _save_classifier(folder: EvaluationFolder, classifiers: LinearClassifiers, chosen: int) -> None:
    """The chosen classifier as torchvision's `fc`, beside the result."""
    tensors = {
        "fc.weight": classifiers.weight[chosen].detach().cpu().contiguous(),
        "fc.bias": classifiers.bias[chosen].detach().cpu().contiguous(),
    }
    write_atomically(folder.path / "classifier.safetensors", save(tensors))


def _headline(
    evaluator: str, weights: str, note: str, num_images: int, held_out: Split | None, protocol: LinearProtocol
) -> str:
    rates = ", ".join(f"{lr:g}" for lr in protocol.lrs)
    chosen_on = f", chosen on {len(held_out):,} images held out of train" if held_out is not None else ""
    kind = "a quick estimate on cached centre-crop features" if protocol.cached_features else "MoCo-v2's protocol"
    lines = [
        f"{evaluator} ({kind}) of {weights}: {num_images:,} images, {protocol.epochs} epochs, learning rate {rates}"
        f"{chosen_on}"
    ]
    return "\n".join([*lines, note] if note else lines)
