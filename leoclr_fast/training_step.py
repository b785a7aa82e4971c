"""The training step: crops in, weights moved, metrics out.

Legend: B images of this rank, V views, S side of a view, D projection, P keys of each query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from leoclr_fast.config import RunConfig
from leoclr_fast.precision import encoder_dtype, encoder_precision
from leoclr_fast.training_state import TrainingState
from pipelines.augment import AugmentParameters, augment_crops, draw_augmentation
from pipelines.batch import CropBatch

STEP_METRICS = ("loss", "positive_similarity", "negative_similarity", "gradient_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """All that a step gets from outside the training state, on its device."""

    crops: Tensor
    """uint8 [B, V, S, S, 3]."""
    augmentation: AugmentParameters
    """V * B rows, view by view."""
    key_orders: tuple[Tensor, ...]
    """int64, one for each pass of the key encoder: the order in which it meets its images; none where it does not
    matter."""


class TrainingStep:
    """One step of pretraining, for every method, precision and number of ranks.

    The host draws what is random, and what follows is a function of tensors on the device.
    """

    def __init__(self, training: TrainingState, config: RunConfig, device: torch.device) -> None:
        self.training = training
        self.device = device
        self._result, self._speed = config.result, config.speed
        self._weights = list(training.method.query_encoder.parameters())
        self._statistics = [b for b in training.method.query_encoder.buffers() if b.is_floating_point()]
        ranks, batch_size = training.method.ranks, config.result.batch_size
        self._share = ranks.local_size(batch_size) / batch_size  # of the global batch, on this rank

    def __call__(self, batch: CropBatch, lr: float) -> Tensor:
        """Train on a batch of this rank.

        batch: its crops on the step's device. lr: the learning rate of this step.
        Returns float64 [4] on the device: this rank's contribution to each of `STEP_METRICS`, to be summed over ranks.
        """
        for group in self.training.optimizer.param_groups:
            group["lr"] = lr
        metrics = self._step(self._draw(batch))
        self.training.step += 1
        return metrics

    def _draw(self, batch: CropBatch) -> StepInputs:
        """The random numbers of the step, drawn on the host and on their way to the device."""
        method, result = self.training.method, self._result
        parameters = draw_augmentation(method.views, result.views, result.seed, batch.epoch, batch.indices)
        orders = method.key_orders(len(batch.crops), result.batch_size, result.seed, self.training.step)
        return StepInputs(
            crops=batch.crops,
            augmentation=parameters.to(self.device),
            key_orders=tuple(order.to(self.device, non_blocking=True) for order in orders),
        )

    def _step(self, inputs: StepInputs) -> Tensor:
        result, speed, training = self._result, self._speed, self.training
        method, optimizer, scaler, ranks = training.method, training.optimizer, training.scaler, training.method.ranks
        # ---- a single training step -------------------------------------------------------------------------
        query_view, *key_views = augment_crops(
            inputs.crops, inputs.augmentation, method.views, result.views, dtype=encoder_dtype(speed.precision)
        )  # [B, 3, S, S] each
        method.update_key_encoder()
        with encoder_precision(speed.precision, self.device):
            keys = method.encode_keys(key_views, inputs.key_orders, result.batch_size)  # P x [B, D]
            query = method.query_encoder(query_view)  # [B, D]
        loss = method.loss(query, keys, speed.loss_impl) * self._share

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        if ranks.world_size > 1:
            torch._foreach_mul_(self._statistics, self._share)
            ranks.all_reduce_sum([*gradients, *self._statistics])
        scaler.unscale_(optimizer)
        gradient_norm = get_total_norm(gradients)
        scaler.step(optimizer)
        scaler.update()

        positive, negative = method.similarities(query, keys)
        method.enqueue(keys, result.batch_size)
        # ---- end of the step --------------------------------------------------------------------------------
        shares = (loss, positive * self._share, negative * self._share, gradient_norm * self._share)
        return torch.stack([value.detach().double() for value in shares])
