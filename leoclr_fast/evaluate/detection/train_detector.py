"""Fine-tuning a detector: the loop, with one visible step."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from torch import nn
from torchvision.models.resnet import ResNet

from dataset_tools.files import open_own, write_file
from dataset_tools.schema import FileContentError
from leoclr_fast.distributed.batch_statistics import BatchStatistics, batch_statistics
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d, replace_batchnorm
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.image_batches import (
    BatchReader,
    DetectionBatch,
    Draw,
    GroupedOrder,
    ImageRequest,
)
from leoclr_fast.evaluate.fine_tuning import decay_groups
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.checkpoint import list_checkpoints
from leoclr_fast.run.documents import read_line
from leoclr_fast.run.stepper import Stepper
from leoclr_fast.run.telemetry import NonFiniteLossError, ProgressDisplay
from pipelines.counter_rng import crop_stream, uniform
from pipelines.order import rank_slice

log = logging.getLogger(__name__)


def build_detector(
    backbone: ResNet, num_classes: int, config: DetectionConfig, precision: str, ranks: Ranks, device: torch.device
) -> FasterRCNNC4:
    """The detector before its first iteration, its heads drawn from the seed; its batch-norm is over all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        detector = FasterRCNNC4(
            backbone, num_classes, anchor_sizes=config.anchor_sizes, regions_per_image=config.regions_per_image
        )
    detector.to(device, encoder_dtype(precision)).to(memory_format=torch.channels_last)
    if ranks.world_size > 1:
        replace_batchnorm(detector, lambda norm: SyncBatchNorm2d(norm, ranks))
    return detector


class _Iteration(Struct):
    """A line of the log."""

    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorTraining:
    """What the loop works with."""

    config: DetectionConfig
    detector: FasterRCNNC4
    images: Sequence[AnnotatedImage]
    """To learn from."""
    reader: BatchReader
    ranks: Ranks
    precision: str
    metrics_file: Path
    log_every: int

    def run(self, stepper: Stepper, display: ProgressDisplay) -> None:
        """Train from the checkpoint on, if there is one; at the end average the running statistics, and save.

        Raises NonFiniteLossError, or as `Stepper.steps`.
        """
        ranks, config, detector = self.ranks, self.config, self.detector
        optimizer = torch.optim.SGD(decay_groups(detector, config.weight_decay), lr=config.lr, momentum=config.momentum)
        scaler = torch.amp.GradScaler(self.reader.device.type, enabled=self.precision == "fp16")
        parameters = list(detector.parameters())
        share = ranks.local_size(config.batch_size) / config.batch_size  # of the global batch, on this rank
        statistics_are_precise = False
        saved = stepper.load()
        if saved is not None:
            detector.load_state_dict(saved["detector"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            statistics_are_precise = saved["statistics_are_precise"]
            self._warn_of_other_ranks(saved["world_size"])

        def state() -> dict[str, Any]:
            return {
                "statistics_are_precise": statistics_are_precise,
                "detector": detector.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "world_size": ranks.world_size,
            }

        self._keep_metrics_until(stepper.step)
        detector.train()
        with torch.random.fork_rng(devices=[self.reader.device] if self.reader.device.type == "cuda" else []):
            for batch in stepper.steps(lambda step: self._batches(step, config.iterations - step), state):
                # ---- a single training step -------------------------------------------------------------------------
                lr = config.learning_rate(stepper.step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                self._seed_sampling(stepper.step)
                with encoder_precision(self.precision, self.reader.device):
                    losses, _ = detector(batch.images, batch.sizes, batch.targets)
                parts = torch.stack([value.detach() for value in losses.values()]) * share
                optimizer.zero_grad()
                scaler.scale(torch.stack(list(losses.values())).sum() * share).backward()
                if ranks.world_size > 1:
                    for parameter in parameters:
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                    ranks.all_reduce_sum([parameter.grad for parameter in parameters if parameter.grad is not None])
                    ranks.all_reduce_sum([parts])
                scaler.step(optimizer)
                scaler.update()
                # ---- end of the step --------------------------------------------------------------------------------
                iteration = stepper.step + 1
                self._require_finite(parts, iteration, stepper.folder)
                if iteration % self.log_every == 0 or iteration == config.iterations:
                    record = {"iteration": iteration, "loss": float(parts.sum())}
                    record |= {**dict(zip(losses, parts.tolist(), strict=True)), "lr": lr}
                    if ranks.is_main:
                        with open_own(self.metrics_file, "a") as file:
                            file.write(json.dumps(record) + "\n")
                    epoch = stepper.step * config.batch_size // len(self.images)
                    stepper.show(display, epoch, record["loss"], lr, config.batch_size)
            if not statistics_are_precise:
                if config.precise_bn_batches:
                    self._average_statistics()
                statistics_are_precise = True
                stepper.save(state())

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Running statistics become mean and biased variance of all values in the batches that would have come next."""
        norms = [module for module in self.detector.modules() if isinstance(module, nn.BatchNorm2d)]
        found: dict[nn.Module, BatchStatistics] = {}

        def merge(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            mean, variance, count = batch_statistics(inputs[0], self.ranks)
            if norm in found:
                before = found[norm]
                count = count + before.num_values
                share, shift = 1 - before.num_values / count, mean - before.mean
                mean = before.mean + share * shift
                variance = before.variance.lerp(variance, share) + share * (1 - share) * shift.square()
            found[norm] = BatchStatistics(mean, variance, count)

        hooks = [norm.register_forward_pre_hook(merge) for norm in norms]
        first = self.config.iterations
        for number, batch in enumerate(self._batches(first, self.config.precise_bn_batches), start=1):
            self._seed_sampling(first + number)
            with encoder_precision(self.precision, self.reader.device):
                self.detector(batch.images, batch.sizes, batch.targets)
        for hook in hooks:
            hook.remove()
        for norm, statistics in found.items():
            norm.running_mean.copy_(statistics.mean)  # type: ignore[operator]
            norm.running_var.copy_(statistics.variance)  # type: ignore[operator]

    def _batches(self, start: int, number: int) -> Iterator[DetectionBatch]:
        """This rank's part of `number` global batches."""
        order = GroupedOrder(
            wide=np.array([image.width > image.height for image in self.images]),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )
        part = rank_slice(self.config.batch_size, self.ranks.rank, self.ranks.world_size)
        batches = order.batches(start)
        return self.reader.read([self._request(draw) for draw in next(batches)[part]] for _ in range(number))

    def _request(self, draw: Draw) -> ImageRequest:
        side, flip = uniform(self.config.seed, draw.epoch, np.array([draw.index]), crop_stream(0), 2)[0]
        sides = self.config.train_sides
        return ImageRequest(image=self.images[draw.index], side=sides[int(side * len(sides))], flipped=bool(flip < 0.5))

    def _seed_sampling(self, iteration: int) -> None:
        """Which anchors and regions are sampled depends on seed, iteration and rank alone."""
        torch.manual_seed((self.config.seed * 1_000_003 + iteration) * 4096 + self.ranks.rank)

    def _require_finite(self, parts: torch.Tensor, iteration: int, folder: Path) -> None:
        if bool(parts.isfinite().all()):
            return
        checkpoints = list_checkpoints(folder)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise NonFiniteLossError(
            f"the detector's loss became non-finite at iteration {iteration} ({parts.tolist()}); {kept}. "
            "Lower --lr, or choose another --precision"
        )

    def _warn_of_other_ranks(self, world_size: int) -> None:
        if world_size != self.ranks.world_size:
            log.warning(
                "the checkpoint was written by %d ranks, now there are %d: other anchors and regions are sampled from "
                "here on",
                *(world_size, self.ranks.world_size),
            )

    def _keep_metrics_until(self, iteration: int) -> None:
        """Drop what was logged after the checkpoint, and a half-written last line."""
        if not self.ranks.is_main or not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_bytes().splitlines(keepends=True):
            with suppress(FileContentError):
                if read_line(line, _Iteration)["iteration"] <= iteration:
                    kept.append(line)
        write_file(self.metrics_file, b"".join(kept))
