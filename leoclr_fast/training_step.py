"""The training step: crops in, weights moved, metrics out.

Legend: B images of this rank, V views, S side of a view, D projection, P keys of each query.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from leoclr_fast.acceleration import captures_step, compiles_encoders
from leoclr_fast.config import RunConfig
from leoclr_fast.folded_encoder import FoldedEncoder
from leoclr_fast.graph_capture import StaticFunction
from leoclr_fast.precision import encoder_precision, require_precision, view_dtype
from leoclr_fast.telemetry import STEP_METRICS
from leoclr_fast.training_state import TrainingState
from pipelines.augment import AugmentParameters, augment_crops, draw_augmentation
from pipelines.batch import CropBatch

log = logging.getLogger(__name__)


class TrainingStep:
    """One step of pretraining, for every method, precision and number of ranks.

    The host draws what is random; what follows is a function of tensors on the device, which never waits for the host.
    On a GPU, that function is captured as one CUDA graph for batches of the common size; others run eagerly.
    """

    def __init__(
        self, training: TrainingState, config: RunConfig, device: torch.device, *, static: bool | None = None
    ) -> None:
        """static: whether the common batch goes through buffers that stay where they are, and on a GPU through a
        captured graph; as `config.speed.cuda_graph` says if not given.

        Raises ValueError for a precision, compilation or capture that is asked for and that the device cannot do.
        """
        self.training = training
        self.device = device
        self._result, self._speed = config.result, config.speed
        method, ranks, batch_size = training.method, training.method.ranks, config.result.batch_size
        require_precision(config.speed.precision, device)
        self._weights = list(method.query_encoder.parameters())
        self._statistics = [buffer for buffer in method.query_encoder.buffers() if buffer.is_floating_point()]
        self._common_size = ranks.local_size(batch_size)
        self._share = self._common_size / batch_size  # of the global batch, on this rank
        self._folded = FoldedEncoder(method.key_encoder) if config.result.method.key_batchnorm == "ema" else None
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # sizes stay the same for a whole run
        self._is_compiled = compiles_encoders(config.speed, device)
        self._compiled_query_encoder: Callable[[Tensor], Tensor] = method.query_encoder
        self._compiled_key_encoder: Callable[[Tensor], Tensor] = self._folded or method.key_encoder
        if self._is_compiled:
            self._compiled_query_encoder = torch.compile(method.query_encoder, dynamic=False)
            if config.result.method.key_batchnorm != "sync":  # which talks to other ranks
                self._compiled_key_encoder = torch.compile(self._folded or method.key_encoder, dynamic=False)
        self._is_static = captures_step(config.speed, device, ranks.world_size) if static is None else static
        self._static: StaticFunction | None = None

    def __call__(self, batch: CropBatch, lr: float) -> Tensor:
        """Train on a batch of this rank.

        batch: its crops on the step's device. lr: the learning rate of this step.
        Returns float64 [4] on the device: this rank's contribution to each of `STEP_METRICS`, to be summed over ranks.
        """
        inputs = self._draw(batch)
        self.training.set_learning_rate(lr)
        if self._is_static and self._static is None and len(batch.crops) == self._common_size:
            self._static = self._captured(inputs)
        if self._static is not None and self._static.takes(inputs):
            metrics = self._static(inputs)
        else:
            metrics = self._step([tensor.to(self.device, non_blocking=True) for tensor in inputs])
        self.training.step += 1
        return metrics

    def forget_captured(self) -> None:
        """Give back the memory of a captured step, and of a step that was cut short; the next common batch is captured
        anew."""
        self._static = None
        self.training.forget_unfinished_step()

    def _captured(self, inputs: Sequence[Tensor]) -> StaticFunction | None:
        """The step as a static function; None where that fails and `auto` allows to go without."""
        try:
            return StaticFunction(self._step, inputs, self.training.tensors())
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.forget_captured()
            if self._is_compiled and self._speed.compile == "auto":
                log.warning("the step runs without torch.compile, slower, since it failed here: %s", error)
                self._is_compiled = False
                return self._captured(inputs)
            if self._speed.cuda_graph != "auto":
                raise
            log.warning("the step is not captured as a CUDA graph, and slower, since that failed here: %s", error)
            self._is_static = False
            return None

    def _draw(self, batch: CropBatch) -> list[Tensor]:
        """Crops [B, V, S, S, 3], parameters of the augmentation, orders of the keys: what a step needs from outside.

        The last two are drawn here, on the host, and pinned where a copy to the device would wait otherwise.
        """
        method, result = self.training.method, self._result
        parameters = draw_augmentation(method.views, result.views, result.seed, batch.epoch, batch.indices)
        orders = method.key_orders(len(batch.crops), result.batch_size, result.seed, self.training.step)
        drawn = [parameters.table, *orders]
        return [batch.crops, *((tensor.pin_memory() for tensor in drawn) if self.device.type == "cuda" else drawn)]

    def _step(self, inputs: Sequence[Tensor]) -> Tensor:
        crops, augmentation, *key_orders = inputs
        result, speed, training = self._result, self._speed, self.training
        method, optimizer, scaler, ranks = training.method, training.optimizer, training.scaler, training.method.ranks
        query_encoder: Callable[[Tensor], Tensor] = method.query_encoder
        key_encoder: Callable[[Tensor], Tensor] = self._folded or method.key_encoder
        if self._is_compiled and len(crops) == self._common_size:  # compiled code is for one size
            query_encoder, key_encoder = self._compiled_query_encoder, self._compiled_key_encoder
        # ---- a single training step -------------------------------------------------------------------------
        query_view, *key_views = augment_crops(
            crops, AugmentParameters(augmentation), method.views, result.views, dtype=view_dtype(speed.precision)
        )  # [B, 3, S, S] each
        method.update_key_encoder()
        if self._folded is not None:
            self._folded.refresh()
        with encoder_precision(speed.precision, self.device):
            keys = method.encode_keys(key_views, key_orders, result.batch_size, key_encoder)  # P x [B, D]
            query = query_encoder(query_view)  # [B, D]
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
        metrics = {
            "loss": loss,
            "positive_similarity": positive * self._share,
            "negative_similarity": negative * self._share,
            "gradient_norm": gradient_norm * self._share,
        }
        return torch.stack([metrics[name].detach().double() for name in STEP_METRICS])
