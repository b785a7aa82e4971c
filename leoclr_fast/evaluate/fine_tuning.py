"""Fine-tuning a whole network on labelled images: one training, from a backbone to scores.

Legend: B images of this rank, N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from dataset_tools.stop_signals import StoppedBySignalError, stop_signals
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.evaluation_folder import Checkpoints
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.progress import EvaluationProgress
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.telemetry import TrainingClock
from leoclr_fast.schedules import learning_rate
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch
from pipelines.loader import Loader

_CLASSIFIER_STD = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Hyperparameters of one fine-tuning: SGD with Nesterov momentum and cosine decay."""

    lr: float
    weight_decay: float
    """Not on batch-norm."""
    momentum: float
    total_steps: int
    batch_size: int
    batchnorm_momentum: float = 0.1
    """Of the running statistics, as torch counts: the weight of the newest batch."""
    seed: int = 0
    """Draws the classifier's first weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuner:
    """Trains copies of one backbone on the images of `loader`."""

    backbone: ResNet
    num_classes: int
    loader: Loader
    precision: str
    ranks: Ranks
    display: EvaluationProgress

    def train(self, training: Training, checkpoints: Checkpoints) -> ResNet | None:
        """The fine-tuned network with its classifier, from the checkpoint on if there is one; None if it diverged.

        The ranks have a batch-norm each; gradients are means over the global batch, running statistics over the ranks.
        Raises PausedError, or StoppedBySignalError on SIGINT and SIGTERM, after a checkpoint.
        """
        ranks, loader, device = self.ranks, self.loader, self.loader.device
        network = self._network(training)
        weights = list(network.parameters())
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        optimizer = torch.optim.SGD(
            _parameter_groups(network, training.weight_decay), lr=training.lr, momentum=training.momentum, nesterov=True
        )
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        share = ranks.local_size(training.batch_size) / training.batch_size
        step, epoch_loss = 0, torch.zeros((), dtype=torch.float64, device=device)
        saved = checkpoints.load(device)
        if saved is not None:
            step = saved["step"]
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:
                scaler.load_state_dict(saved["scaler"])
            if ranks.is_main:
                epoch_loss.copy_(saved["epoch_loss"])

        def state() -> dict[str, Any]:
            return {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch_loss": epoch_loss,
            }

        clock = TrainingClock(step)
        with stop_signals(enabled=ranks.world_size == 1) as stop:
            to_come = max(0, checkpoints.last_step(training.total_steps) - step)
            batches = clock.timed(islice(_batches_from(loader, step), to_come))
            for batch in batches:
                # ---- a single training step ---------------------------------------------------------------------
                if batch.step == 0:
                    epoch_loss.zero_()
                lr = learning_rate("cosine_per_step", training.lr, step, training.total_steps, 1)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                (images,) = augmented_views(
                    batch, loader.views, loader.view_config, seed=loader.seed, dtype=encoder_dtype(self.precision)
                )  # [B, 3, S, S]
                labels = batch.labels.to(device, non_blocking=True)
                with encoder_precision(self.precision, device):
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
                step += 1
                # ---- end of the step ----------------------------------------------------------------------------
                if batch.step + 1 == loader.steps_per_epoch or step == training.total_steps:
                    if not self._goes_on(epoch_loss / (batch.step + 1), step, batch.epoch, lr, training, clock):
                        return None
                    checkpoints.save(step, state, due=step == training.total_steps)
                if stop.requested and step < training.total_steps:
                    checkpoints.save(step, state)
                    raise StoppedBySignalError(
                        f"stopped by {stop.name} after step {step} of {training.total_steps}; the same command "
                        "continues from there"
                    )
        if step < training.total_steps:
            ranks.all_reduce_sum([epoch_loss])
            checkpoints.pause(step, state)
        return network

    def scores(self, network: nn.Module, images: Loader) -> tuple[Tensor, Tensor]:
        """Class scores [N, C] and labels [N] of all images of a sequential loader; the same on every rank."""
        return extract_features(network, images, self.precision, self.ranks, normalized=False)

    def _network(self, training: Training) -> ResNet:
        """A copy of the backbone under a new classifier, in training mode."""
        network = deepcopy(self.backbone)
        network.fc = nn.Linear(network.feature_dim, self.num_classes)
        generator = torch.Generator().manual_seed(training.seed)
        nn.init.normal_(network.fc.weight, std=_CLASSIFIER_STD, generator=generator)
        nn.init.zeros_(network.fc.bias)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = training.batchnorm_momentum
        network.to(self.loader.device, encoder_dtype(self.precision)).to(memory_format=torch.channels_last)
        return network.requires_grad_(True).train()

    def _goes_on(
        self, loss: Tensor, step: int, epoch: int, lr: float, training: Training, clock: TrainingClock
    ) -> bool:
        """Show how an epoch went; whether its loss, over all ranks, was a number."""
        self.ranks.all_reduce_sum([loss])
        mean = float(loss)
        self.display.update(step, epoch, mean, lr, training.batch_size, clock)
        return math.isfinite(mean)


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Batch-norm's scale and shift without weight decay, all others with it."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    undecayed = [parameter for module in norms for parameter in module.parameters()]
    ids = {id(parameter) for parameter in undecayed}
    decayed = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def _batches_from(loader: Loader, step: int) -> Iterator[CropBatch]:
    """The batches of all epochs to come, from the one that follows `step` finished steps."""
    first_epoch, start_step = divmod(step, loader.steps_per_epoch)
    for epoch in count(first_epoch):
        yield from loader.batches(epoch, start_step if epoch == first_epoch else 0)
