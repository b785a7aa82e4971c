"""The training step: crops in, weights moved, metrics out.

Legend: B images of this rank, G of all ranks together, b of this rank in a micro-batch, V views, S side of a view,
D projection, P keys of each query, N key views that this rank encodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.gradient_compression import wire_dtype
from leoclr_fast.machine.precision import encoder_precision, require_precision, view_dtype
from leoclr_fast.method.folded_encoder import FoldedEncoder
from leoclr_fast.method.key_schedule import KeyOrder, KeySchedule
from leoclr_fast.run.telemetry import STEP_METRICS
from leoclr_fast.training.acceleration import captures_step, compiles_encoders
from leoclr_fast.training.cuda_graph import StaticFunction
from leoclr_fast.training.state import TrainingState
from pipelines.augment import AugmentParameters, augment_crops, draw_augmentation
from pipelines.batch import CropBatch
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)


class TrainingStep:
    """One step of pretraining, for every method, precision, number of micro-batches and number of ranks.

    The host draws what is random, and the ranks hand each other the crops whose keys another one encodes: uint8, before
    the augmentation, whose parameters travel with them. What follows is a function of tensors on the device, of fixed
    shapes, which never waits for the host. On a GPU, that function is captured as one CUDA graph for batches of the
    common size; others run eagerly.
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
        # Synchronised batch-norm has the same running statistics everywhere already.
        averages_statistics = config.result.method.query_batchnorm != "sync"
        buffers = method.query_encoder.buffers() if averages_statistics else ()
        self._statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._wire_dtype = wire_dtype(config.speed, ranks, device)
        self._common = self._schedule(batch_size)
        self._folded = FoldedEncoder(method.key_encoder) if config.result.method.key_batchnorm == "ema" else None
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # sizes stay the same for a whole run
        self._is_compiled = compiles_encoders(config.speed, device)
        self._compiled_query_encoder: Callable[[Tensor], Tensor] = method.query_encoder
        self._compiled_key_encoder: Callable[[Tensor], Tensor] = self._folded or method.key_encoder
        if self._is_compiled:
            synchronised = ranks.world_size > 1  # then batch-norm talks to other ranks
            if not (config.result.method.query_batchnorm == "sync" and synchronised):
                self._compiled_query_encoder = torch.compile(method.query_encoder, dynamic=False)
            if not (config.result.method.key_batchnorm == "sync" and synchronised):
                self._compiled_key_encoder = torch.compile(self._folded or method.key_encoder, dynamic=False)
        self._is_static = captures_step(config.speed, device, ranks) if static is None else static
        self._static: StaticFunction | None = None

    def __call__(self, batch: CropBatch, lr: float) -> Tensor:
        """Train on a batch of this rank.

        batch: its crops on the step's device. lr: the learning rate of this step.
        Returns float64 [4] on the device: this rank's contribution to each of `STEP_METRICS`, to be summed over ranks.
        """
        schedule = self._schedule_of(batch)
        inputs = self._inputs(batch, schedule)
        self.training.set_learning_rate(lr)
        if self._is_static and self._static is None and schedule is self._common:
            self._static = self._captured(inputs)
        if self._static is not None and self._static.takes(inputs):
            metrics = self._static(inputs)
        else:
            metrics = self._step([tensor.to(self.device, non_blocking=True) for tensor in inputs], schedule)
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
            return StaticFunction(partial(self._step, schedule=self._common), inputs, self.training.tensors())
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

    def _schedule(self, batch_size: int) -> KeySchedule:
        """The passes of the key encoder over a global batch of this size."""
        ranks, result = self.training.method.ranks, self._result
        layout = BatchLayout(
            batch_size=batch_size,
            micro_batches=min(result.micro_batches, batch_size),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        return KeySchedule(result.method, layout)

    def _schedule_of(self, batch: CropBatch) -> KeySchedule:
        """That of the batch; a single rank takes batches of any size."""
        size = len(batch.crops)
        if size == self._common.layout.local_size:
            return self._common
        assert self.training.method.ranks.world_size == 1, "several ranks share full batches alone"
        return self._schedule(size)

    def _inputs(self, batch: CropBatch, schedule: KeySchedule) -> list[Tensor]:
        """What a step needs from outside: the query's crops [B, S, S, 3], the crops of the keys that this rank encodes
        [N, S, S, 3], the parameters of the augmentation [B + N, 13], and the place of every key [P * G].

        What is drawn here, on the host, is pinned where a copy to the device would wait otherwise.
        """
        method, result = self.training.method, self._result
        drawn = draw_augmentation(method.views, result.views, result.seed, batch.epoch, batch.indices).table
        query_table, key_table = drawn.split((len(batch.crops), len(drawn) - len(batch.crops)))
        order = schedule.draw(result.seed, self.training.step)
        rows, views = torch.from_numpy(order.sent_rows), torch.from_numpy(order.sent_views)
        key_table = key_table[views * len(batch.crops) + rows]  # it is view by view
        num_views = batch.crops.shape[1]
        key_crops = batch.crops.flatten(0, 1)[self._to_device(rows * num_views + 1 + views)]
        table = torch.cat((query_table, key_table))
        if schedule.exchanges:
            key_crops, key_table = self._exchanged(key_crops, self._to_device(key_table), order)
            table = torch.cat((self._to_device(query_table), key_table))
        restore = torch.from_numpy(order.restore)
        return [batch.crops[:, 0], key_crops, *(self._pinned(tensor) for tensor in (table, restore))]

    def _exchanged(self, crops: Tensor, table: Tensor, order: KeyOrder) -> tuple[Tensor, Tensor]:
        """Hand the crops [M, S, S, 3] to the ranks that encode them, each with its row of parameters: one all-to-all
        of bytes. Returns the crops that this rank encodes and their parameters, in the order of its passes."""
        pixels = crops.flatten(1)
        sent = torch.cat((pixels, table.view(torch.uint8)), dim=1)
        received = self.training.method.ranks.all_to_all_rows(sent, order.send_sizes, order.receive_sizes)
        place = self._to_device(torch.from_numpy(order.place))
        pixels, rows = (
            part[place] for part in received.split((pixels.shape[1], received.shape[1] - pixels.shape[1]), 1)
        )
        return pixels.unflatten(1, crops.shape[1:]), rows.view(torch.float64)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.device.type == "cpu" else tensor

    def _to_device(self, tensor: Tensor) -> Tensor:
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _augmented(self, crops: Tensor, table: Tensor, views: ViewRecipe, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Views [size, 3, S, S] of the crops [n, S, S, 3], for each of the sizes in turn; made when it comes."""
        dtype = view_dtype(self._speed.precision)
        for part, rows in zip(crops.split(list(sizes)), table.split(list(sizes)), strict=True):
            yield augment_crops(part[:, None], AugmentParameters(rows), views, self._result.views, dtype=dtype)[0]

    def _sum_over_ranks(self, gradients: Sequence[Tensor], share: float) -> None:
        """Gradients, and the mean of the running statistics weighted by the images behind them. share: this rank's."""
        ranks = self.training.method.ranks
        if ranks.world_size == 1:
            return
        if self._statistics:
            torch._foreach_mul_(self._statistics, share)
        if self._wire_dtype is None:
            ranks.all_reduce_sum([*gradients, *self._statistics])
        else:
            ranks.all_reduce_sum(gradients, self._wire_dtype)
            ranks.all_reduce_sum(self._statistics)

    def _step(self, inputs: Sequence[Tensor], schedule: KeySchedule) -> Tensor:
        query_crops, key_crops, table, restore = inputs
        speed, training, layout = self._speed, self.training, schedule.layout
        method, optimizer, scaler = training.method, training.optimizer, training.scaler
        query_encoder: Callable[[Tensor], Tensor] = method.query_encoder
        key_encoder: Callable[[Tensor], Tensor] = self._folded or method.key_encoder
        if self._is_compiled and schedule is self._common:  # compiled code is for few sizes
            query_encoder, key_encoder = self._compiled_query_encoder, self._compiled_key_encoder
        query_table, key_table = table.split((len(query_crops), len(key_crops)))
        query_views = self._augmented(query_crops, query_table, method.views[:1], layout.own_sizes)
        key_views = self._augmented(key_crops, key_table, method.views[1:2], schedule.pass_sizes)
        rows = []
        # ---- a single training step -------------------------------------------------------------------------
        method.update_key_encoder()
        if self._folded is not None:
            self._folded.refresh()
        with encoder_precision(speed.precision, self.device):
            keys = method.encode_keys(key_views, restore, schedule.most, key_encoder)  # P x [G, D], of all ranks

        optimizer.zero_grad()
        for view, images in zip(query_views, layout.own, strict=True):  # of each micro-batch: [b, 3, S, S], a slice
            with encoder_precision(speed.precision, self.device):
                query = query_encoder(view)  # [b, D]
            positives, share = [key[images] for key in keys], len(view) / layout.batch_size
            loss = method.loss(query, positives, speed.loss_impl) * share
            scaler.scale(loss).backward()
            similarities = method.similarities(query, positives)
            rows.append([loss, *(similarity * share for similarity in similarities)])

        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        own_share = layout.local_size / layout.batch_size
        self._sum_over_ranks(gradients, own_share)
        scaler.unscale_(optimizer)
        gradient_norm = get_total_norm(gradients)
        scaler.step(optimizer)
        scaler.update()
        method.enqueue(keys)
        # ---- end of the step --------------------------------------------------------------------------------
        loss, positive, negative = torch.stack([torch.stack([v.detach().double() for v in row]) for row in rows]).sum(0)
        metrics = {
            "loss": loss,
            "positive_similarity": positive,
            "negative_similarity": negative,
            "gradient_norm": (gradient_norm * own_share).double(),
        }
        return torch.stack([metrics[name] for name in STEP_METRICS])
