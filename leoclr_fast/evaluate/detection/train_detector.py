"""Fine-tuning a detector: the loop, with one visible step."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset_tools.stop_signals import StoppedBySignalError, stop_signals
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.detector_state import DetectorState
from leoclr_fast.evaluate.detection.image_batches import BatchReader, DetectionBatch, Wish
from leoclr_fast.evaluate.detection.order import Draw, GroupedOrder
from leoclr_fast.machine.precision import encoder_precision
from leoclr_fast.run.checkpoint import list_checkpoints, save_checkpoint
from leoclr_fast.run.folder import write_atomically
from leoclr_fast.run.telemetry import NonFiniteLossError
from pipelines.counter_rng import crop_stream, uniform
from pipelines.order import rank_slice

log = logging.getLogger(__name__)

_KEEP_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorTraining:
    """What the loop works with."""

    config: DetectionConfig
    state: DetectorState
    images: tuple[AnnotatedImage, ...]
    reader: BatchReader
    ranks: Ranks
    precision: str
    folder: Path
    checkpoint_every: int
    log_every: int

    def run(self, last_iteration: int) -> None:
        """Train until `last_iteration`; at the configured end average the running statistics. Saves checkpoints.

        Raises NonFiniteLossError, OSError (a full disk), StoppedBySignalError after a checkpoint.
        """
        if self.state.iteration < last_iteration:
            with torch.random.fork_rng(devices=_cuda_devices(self.reader.device)):
                self._train(last_iteration)
        if self.state.iteration == self.config.iterations and not self.state.statistics_are_precise:
            if self.config.precise_bn_batches:
                with torch.random.fork_rng(devices=_cuda_devices(self.reader.device)):
                    self._average_statistics()
            self.state.statistics_are_precise = True
            self._save()

    def _train(self, last_iteration: int) -> None:
        state, detector, ranks, config = self.state, self.state.detector, self.ranks, self.config
        share = ranks.local_size(config.batch_size) / config.batch_size  # of the global batch, on this rank
        parameters = list(detector.parameters())
        detector.train()
        self._keep_metrics_until(state.iteration)
        began, first = time.perf_counter(), state.iteration
        with stop_signals(enabled=ranks.world_size == 1) as stop:
            batches = self._batches(state.iteration, last_iteration - state.iteration)
            for batch in batches:
                # ---- a single training step -----------------------------------------------------------------
                lr = config.learning_rate(state.iteration)
                for group in state.optimizer.param_groups:
                    group["lr"] = lr
                self._seed_sampling(state.iteration)
                with encoder_precision(self.precision, self.reader.device):
                    losses, _ = detector(batch.images, batch.sizes, batch.targets)
                parts = torch.stack([value.detach() for value in losses.values()]) * share
                state.optimizer.zero_grad()
                state.scaler.scale(torch.stack(list(losses.values())).sum() * share).backward()
                if ranks.world_size > 1:
                    for parameter in parameters:
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                    ranks.all_reduce_sum([parameter.grad for parameter in parameters if parameter.grad is not None])
                    ranks.all_reduce_sum([parts])
                state.scaler.step(state.optimizer)
                state.scaler.update()
                state.iteration += 1
                # ---- end of the step ------------------------------------------------------------------------
                self._require_finite(parts)
                if state.iteration % self.log_every == 0 or state.iteration == last_iteration:
                    seconds = (time.perf_counter() - began) / (state.iteration - first)
                    self._log(dict(zip(losses, parts.tolist(), strict=True)), lr, seconds)
                if state.iteration % self.checkpoint_every == 0 or state.iteration == last_iteration or stop.requested:
                    self._save()
                if stop.requested:
                    raise StoppedBySignalError(
                        f"stopped by {stop.name} after iteration {state.iteration}; a checkpoint was saved, and the "
                        "same command continues from there"
                    )

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Running statistics become plain means over the batches that would have come next."""
        norms = [module for module in self.state.detector.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        own = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        averages = [torch.zeros_like(buffer) for buffer in own]
        self.state.detector.train()
        first = self.config.iterations
        for norm in norms:
            norm.momentum = 1.0  # so that the running statistics are those of the batch
        batches = self._batches(first, self.config.precise_bn_batches)
        for number, batch in enumerate(batches, start=1):
            self._seed_sampling(first + number)
            with encoder_precision(self.precision, self.reader.device):
                self.state.detector(batch.images, batch.sizes, batch.targets)
            torch._foreach_lerp_(averages, own, 1 / number)
        torch._foreach_copy_(own, averages)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _batches(self, start: int, number: int) -> Iterator[DetectionBatch]:
        """This rank's part of `number` global batches."""
        order = GroupedOrder(
            wide=np.array([image.width > image.height for image in self.images]),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )
        part = rank_slice(self.config.batch_size, self.ranks.rank, self.ranks.world_size)
        batches = order.batches(start)
        return self.reader.read([self._wish(draw) for draw in next(batches)[part]] for _ in range(number))

    def _wish(self, draw: Draw) -> Wish:
        side, flip = uniform(self.config.seed, draw.epoch, np.array([draw.index]), crop_stream(0), 2)[0]
        sides = self.config.train_sides
        return Wish(image=self.images[draw.index], side=sides[int(side * len(sides))], flipped=bool(flip < 0.5))

    def _seed_sampling(self, iteration: int) -> None:
        """Which anchors and regions are sampled depends on seed, iteration and rank alone."""
        torch.manual_seed((self.config.seed * 1_000_003 + iteration) * 4096 + self.ranks.rank)

    def _require_finite(self, parts: torch.Tensor) -> None:
        if bool(parts.isfinite().all()):
            return
        checkpoints = list_checkpoints(self.folder)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise NonFiniteLossError(
            f"the detector's loss became non-finite at iteration {self.state.iteration} ({parts.tolist()}); {kept}. "
            "Lower --lr, or choose another --precision"
        )

    def _log(self, losses: dict[str, float], lr: float, seconds: float) -> None:
        if not self.ranks.is_main:
            return
        record = {"iteration": self.state.iteration, "loss": sum(losses.values()), **losses, "lr": lr}
        with open(self._metrics_file, "a") as file:
            file.write(json.dumps(record) + "\n")
        log.info(
            "iteration %d/%d  loss %.3f  lr %.5f  %.2f s/iteration",
            *(self.state.iteration, self.config.iterations, record["loss"], lr, seconds),
        )

    def _keep_metrics_until(self, iteration: int) -> None:
        """Drop what was logged after the checkpoint, and a half-written last line."""
        if not self.ranks.is_main or not self._metrics_file.exists():
            return
        lines = [line for line in self._metrics_file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        write_atomically(self._metrics_file, "".join(f"{line}\n" for line in kept).encode())

    @property
    def _metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _save(self) -> None:
        if self.ranks.is_main:
            save_checkpoint(self.folder, self.state.iteration, self.state.state_dict(), _KEEP_CHECKPOINTS)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    """Those whose generator the sampling seeds."""
    return [device] if device.type == "cuda" else []
