"""The training step: crops in, weights moved, metrics out.

Legend: B images of this rank, V views, S side of a view.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.gradient_buckets import GradientBuckets
from leoclr_fast.machine.precision import encoder_precision, require_precision, view_dtype
from leoclr_fast.training.acceleration import captures_step, compiles_encoders
from leoclr_fast.training.cuda_graph import CaptureError, StaticFunction, is_out_of_memory
from leoclr_fast.training.state import TrainingState
from pipelines.augment import augment_crops, draw_augmentation
from pipelines.batch import CropBatch
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)


class TrainingStep:
    """One step of pretraining, for every method, precision, number of micro-batches and number of ranks.

    The host draws what is random. What follows is a function of tensors on the device, of fixed shapes, which never
    waits for the host. On a GPU, that function is captured as one CUDA graph for batches of the common size; others run
    eagerly.
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
        method, ranks = training.method, training.method.ranks
        require_precision(config.speed.precision, device)
        self.metric_names = method.step_metrics
        self._weights = method.trained_weights()
        # Synchronised batch-norm has the same running statistics everywhere already.
        averages_statistics = config.result.method.query_batchnorm != "sync"
        buffers = method.kept_encoder.buffers() if averages_statistics else ()
        self._statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._buckets = GradientBuckets(self._weights, ranks)
        self._common = self._plan(config.result.batch_size)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # sizes stay the same for a whole run
        self._compiled: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        if compiles_encoders(config.speed, device):
            # What cannot be compiled of the backward pass shows in the forward pass, where it can be done without.
            torch._functorch.config.force_non_lazy_backward_lowering = True
            self._compiled = {encoder: self._compile(encoder) for encoder in method.compiled_encoders()}
        self._runs_compiled = False
        self._is_static = captures_step(config.speed, device, ranks) if static is None else static
        self._static: StaticFunction | None = None

    def __call__(self, batch: CropBatch, lr: float) -> Tensor:
        """Train on a batch of this rank.

        batch: its crops on the step's device. lr: the learning rate of this step.
        Returns float64 [metrics] on the device: this rank's contribution to each of `metric_names`, to be summed over
        ranks. Raises torch.OutOfMemoryError, with what takes less; the training state is then void.
        """
        plan = self._plan_of(batch)
        try:
            inputs = self._inputs(batch, plan)
            self.training.set_learning_rate(lr)
            if self._is_static and self._static is None and plan is self._common:
                self._static = self._captured(inputs)
            if self._static is not None and self._static.takes(inputs):
                metrics = self._static(inputs)
            else:
                metrics = self._step([tensor.to(self.device, non_blocking=True) for tensor in inputs], plan)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                f"a batch of {len(batch.crops)} images does not fit the memory of {self.device}. Give a smaller "
                "--batch-size, more --micro-batches, --precision bf16, or more GPUs."
            ) from error
        self.training.step += 1
        return metrics

    def _inputs(self, batch: CropBatch, plan: Any) -> list[Tensor]:
        """What is drawn and handed between ranks before the step; on the host, pinned where a copy would wait."""
        method, result = self.training.method, self._result
        drawn = draw_augmentation(method.views, result.views, result.seed, batch.epoch, batch.indices)
        inputs = method.inputs(plan, batch, drawn, self.training.step, self)
        return [self._pinned(tensor) for tensor in inputs]

    def _step(self, inputs: Sequence[Tensor], plan: Any) -> Tensor:
        training, layout = self.training, plan.layout
        method, optimizer, scaler = training.method, training.optimizer, training.scaler
        self._runs_compiled = plan is self._common  # compiled code is for few sizes
        rows = []
        # ---- a single training step -------------------------------------------------------------------------
        optimizer.zero_grad()
        self._buckets.begin(layout.micro_batches)
        for loss, num_images, metrics in method.losses(plan, inputs, self):  # of each micro-batch
            share = num_images / layout.batch_size
            loss = loss * share
            scaler.scale(loss).backward()
            rows.append(torch.stack([value.detach().double() for value in (loss, *(m * share for m in metrics))]))

        own_share = layout.local_size / layout.batch_size
        self._average_statistics(own_share)
        self._buckets.finish()
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        scaler.unscale_(optimizer)
        gradient_norm = get_total_norm(gradients)
        scaler.step(optimizer)
        scaler.update()
        # ---- end of the step --------------------------------------------------------------------------------
        return torch.cat([torch.stack(rows).sum(0), (gradient_norm * own_share).double()[None]])

    def _average_statistics(self, share: float) -> None:
        """Of the running statistics the mean over the ranks, weighted by the images behind them. share: this rank's."""
        if self._statistics and self.training.method.ranks.world_size > 1:
            torch._foreach_mul_(self._statistics, share)
            self.training.method.ranks.all_reduce_sum(self._statistics)

    # ---- what a method calls, see `StepTools` ---------------------------------------------------------------

    def views(self, crops: Tensor, parameters: Tensor, recipe: ViewRecipe, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Views [size, 3, S, S] of the crops [N, S, S, 3], for each of the sizes in turn; made when it comes."""
        dtype = view_dtype(self._speed.precision)
        for part, rows in zip(crops.split(list(sizes)), parameters.split(list(sizes)), strict=True):
            yield augment_crops(part[:, None], rows, recipe, self._result.views, dtype=dtype)[0]

    def encode(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """The encoder, compiled where this batch allows it, in the precision of the run."""

        def encoded(images: Tensor) -> Tensor:
            with encoder_precision(self._speed.precision, self.device):
                if not self._runs_compiled or encoder not in self._compiled:
                    return encoder(images)
                try:
                    return self._compiled[encoder](images)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    if self._speed.compile != "auto":
                        raise
                    log.warning("the step runs without torch.compile, slower, since it failed here: %s", error)
                # No other rank knows, and none needs to: the compiled encoders have no collectives.
                self._compiled.clear()
                return encoder(images)

        return encoded

    def _compile(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """With several ranks in two parts where it is trained: the gradients of compiled code come all at once, and
        those of the last layers, most of the bytes, can travel while the first ones are differentiated."""
        if self.training.method.ranks.world_size == 1 or encoder is not self.training.method.kept_encoder:
            return torch.compile(encoder, dynamic=False)
        kept = self.training.method.kept_encoder
        early, late = (torch.compile(part, dynamic=False) for part in (kept.backbone.early, kept.late))
        return lambda images: late(early(images))

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, copied without a wait."""
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.device.type == "cpu" else tensor

    @property
    def means(self) -> str:
        """What makes the step faster on this device, and what more can be asked for; "" on a CPU that has nothing."""
        if self.device.type != "cuda":
            return "compiled" if self._compiled else ""
        graph = "captured as a CUDA graph" if self._is_static else "no CUDA graph"
        if not self._is_static and self._speed.cuda_graph == "auto" and self.training.method.ranks.world_size > 1:
            graph = "no CUDA graph (none was ever tried with several ranks; --cuda-graph on does)"
        return f"{'compiled' if self._compiled else 'not compiled'}, {graph}"

    # ---- plans and graphs -----------------------------------------------------------------------------------

    def _plan(self, batch_size: int) -> Any:
        """The method's, for a global batch of this size."""
        ranks = self.training.method.ranks
        layout = BatchLayout(
            batch_size=batch_size,
            micro_batches=min(self._result.micro_batches, batch_size),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        return self.training.method.plan(layout)

    def _plan_of(self, batch: CropBatch) -> Any:
        """That of the batch; a single rank takes batches of any size."""
        size = len(batch.crops)
        if size == self._common.layout.local_size:
            return self._common
        assert self.training.method.ranks.world_size == 1, "several ranks share full batches alone"
        return self._plan(size)

    def forget_captured(self) -> None:
        """Give back the memory of a captured step, and of one that was cut short."""
        self._static = None
        self.training.forget_unfinished_step()

    def _captured(self, inputs: Sequence[Tensor]) -> StaticFunction | None:
        """The step as a static function; None where the capture fails, on any rank, and `auto` allows to go without."""
        ranks, static, failure = self.training.method.ranks, None, None
        try:
            static = StaticFunction(partial(self._step, plan=self._common), inputs, self.training.tensors())
        except CaptureError as error:
            failure = error.__cause__ or error
        except RuntimeError as error:
            if ranks.world_size > 1 or not is_out_of_memory(error):  # the eager step needs less memory
                raise
            traceback.clear_frames(error.__traceback__)
            failure = error
        # Nothing that is captured has run, so that all ranks are still before the same collective.
        if not ranks.any_says(failure is not None, self.device):
            return static
        static = None
        self.forget_captured()
        if failure is None:
            failure = RuntimeError("another rank could not capture it")
        if self._speed.cuda_graph != "auto":
            raise failure
        reason = str(failure).partition("\n")[0]
        log.warning("the step is not captured as a CUDA graph, and slower, since that failed here: %s", reason)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._is_static = False
        return None
