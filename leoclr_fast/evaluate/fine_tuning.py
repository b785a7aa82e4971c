"""Fine-tuning a whole network on labelled images: one training, from a backbone to a classifier.

Legend: B images of this rank, C classes.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.stepper import Stepper, endless
from leoclr_fast.run.telemetry import ProgressDisplay
from leoclr_fast.schedules import learning_rate
from pipelines.augment import augmented_views
from pipelines.loader import Loader

_CLASSIFIER_STD = 0.01


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
    *,
    precision: str,
    ranks: Ranks,
    display: ProgressDisplay,
) -> ResNet | None:
    """A copy of the backbone, trained with a classifier, from the checkpoint on if there is one; None if it diverged.

    The ranks have a batch-norm each; gradients are means over the global batch, running statistics over the ranks.
    Raises as `Stepper.steps`.
    """
    device = loader.device
    network = _with_classifier(backbone, num_classes, parameters.seed).to(device, encoder_dtype(precision))
    network = network.to(memory_format=torch.channels_last).requires_grad_(True).train()
    weights = list(network.parameters())
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    for norm in batchnorms(network):
        norm.momentum = parameters.batchnorm_momentum or min(10 / loader.steps_per_epoch, 0.1)
    groups = decay_groups(network, parameters.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=parameters.lr, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    share = ranks.local_size(parameters.batch_size) / parameters.batch_size  # of the global batch, on this rank
    epoch_loss = torch.zeros((), dtype=torch.float64, device=device)
    saved = stepper.load()
    if saved is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        if ranks.is_main:
            epoch_loss.copy_(saved["epoch_loss"])

    def state() -> dict[str, Any]:
        loss = epoch_loss.clone()
        ranks.all_reduce_sum([loss])
        return {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch_loss": loss,
        }

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
            stepper.show(display, batch.epoch, float(mean_loss), lr, parameters.batch_size)
            if not math.isfinite(mean_loss):
                return None
    return network


def _with_classifier(backbone: ResNet, num_classes: int, seed: int) -> ResNet:
    network = deepcopy(backbone)
    network.fc = nn.Linear(network.feature_dim, num_classes)
    nn.init.normal_(network.fc.weight, std=_CLASSIFIER_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(network.fc.bias)
    return network


def batchnorms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: batch-norm's scales and shifts without weight decay, all other parameters with it."""
    undecayed = [parameter for norm in batchnorms(network) for parameter in norm.parameters()]
    ids = {id(parameter) for parameter in undecayed}
    decayed = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
