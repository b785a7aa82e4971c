"""Fine-tuning a detector: the loop, with one visible step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from leoclr_fast.distributed.batch_statistics import batch_statistics
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d, replace_batchnorm
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.image_batches import BatchReader, DetectionBatch, training_batches
from leoclr_fast.evaluate.fine_tuning import batchnorms, decay_groups
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.stepper import Stepper
from leoclr_fast.run.telemetry import NonFiniteLossError, ProgressDisplay
from pipelines.order import rank_slice

_SHOW_EVERY = 20


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

    def run(self, stepper: Stepper, display: ProgressDisplay) -> None:
        """Train from the checkpoint on, if there is one; at the end average the running statistics.

        Raises NonFiniteLossError, or as `Stepper.steps`.
        """
        ranks, config, detector = self.ranks, self.config, self.detector
        optimizer = torch.optim.SGD(decay_groups(detector, config.weight_decay), lr=config.lr, momentum=0.9)
        scaler = torch.amp.GradScaler(self.reader.device.type, enabled=self.precision == "fp16")
        parameters = list(detector.parameters())
        share = ranks.local_size(config.batch_size) / config.batch_size  # of the global batch, on this rank
        saved = stepper.load()
        if saved is not None:
            detector.load_state_dict(saved["detector"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])

        def state() -> dict[str, Any]:
            return {
                "detector": detector.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }

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
                if not bool(parts.isfinite().all()):
                    raise NonFiniteLossError(
                        f"the detector's loss became non-finite at iteration {iteration} ({parts.tolist()}); what was "
                        f"saved before is in {stepper.folder}. Lower --lr, or choose another --precision"
                    )
                if iteration % _SHOW_EVERY == 0 or iteration == config.iterations:
                    epoch = stepper.step * config.batch_size // len(self.images)
                    stepper.show(display, epoch, float(parts.sum()), lr, config.batch_size)
            self._average_statistics()

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Running statistics become mean and biased variance of all values in the batches that would have come next."""
        sums: dict[nn.BatchNorm2d, Tensor] = {}

        def add(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            mean, variance, count = (values.double() for values in batch_statistics(inputs[0], self.ranks))
            moments = torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
            sums[norm] = sums.get(norm, 0) + count * moments

        hooks = [norm.register_forward_pre_hook(add) for norm in batchnorms(self.detector)]
        first = self.config.iterations
        for number, batch in enumerate(self._batches(first, self.config.precise_bn_batches), start=1):
            self._seed_sampling(first + number)
            with encoder_precision(self.precision, self.reader.device):
                self.detector(batch.images, batch.sizes, batch.targets)
        for hook in hooks:
            hook.remove()
        for norm, (count, first_moment, second_moment) in sums.items():
            mean = first_moment / count
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(second_moment / count - mean.square())

    def _batches(self, start: int, number: int) -> Iterator[DetectionBatch]:
        """This rank's part of `number` global batches."""
        config = self.config
        part = rank_slice(config.batch_size, self.ranks.rank, self.ranks.world_size)
        batches = training_batches(self.images, config.batch_size, config.train_sides, config.seed)
        return self.reader.read(batch[part] for batch in islice(batches, start, start + number))

    def _seed_sampling(self, iteration: int) -> None:
        """Which anchors and regions are sampled depends on seed, iteration and rank alone."""
        torch.manual_seed((self.config.seed * 1_000_003 + iteration) * 4096 + self.ranks.rank)
