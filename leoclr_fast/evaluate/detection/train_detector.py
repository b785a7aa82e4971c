"""Fine-tuning a detector: the loop, with one visible step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d, batch_statistics, replace_batchnorm
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.image_batches import BatchReader, DetectionBatch, training_batches
from leoclr_fast.evaluate.fine_tuning import batchnorms, decay_groups
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.stepper import Stepper
from leoclr_fast.run.telemetry import NonFiniteLossError
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


def train_detector(
    detector: FasterRCNNC4,
    images: Sequence[AnnotatedImage],
    reader: BatchReader,
    config: DetectionConfig,
    stepper: Stepper,
    precision: str,
) -> None:
    """Train from the checkpoint on, if there is one; at the end average the running statistics.

    Raises NonFiniteLossError, or as `Stepper.steps`.
    """
    ranks = stepper.ranks
    optimizer = torch.optim.SGD(decay_groups(detector, config.weight_decay), lr=config.lr, momentum=0.9)
    scaler = torch.amp.GradScaler(reader.device.type, enabled=precision == "fp16")
    parameters = list(detector.parameters())
    share = ranks.local_size(config.batch_size) / config.batch_size  # of the global batch, on this rank
    trained: dict[str, Any] = {"detector": detector, "optimizer": optimizer, "scaler": scaler}
    saved = stepper.load()
    if saved is not None:
        for name, part in trained.items():
            part.load_state_dict(saved[name])

    def state() -> dict[str, Any]:
        return {name: part.state_dict() for name, part in trained.items()}

    def batches(start: int) -> Iterator[DetectionBatch]:
        """This rank's part of each global batch."""
        part = rank_slice(config.batch_size, ranks.rank, ranks.world_size)
        requests = training_batches(images, config.batch_size, config.train_sides, config.seed)
        return reader.read(batch[part] for batch in islice(requests, start, None))

    def losses_of(batch: DetectionBatch, iteration: int) -> dict[str, Tensor]:
        """Which anchors and regions are sampled depends on seed, iteration and rank alone."""
        torch.manual_seed((config.seed * 1_000_003 + iteration) * 4096 + ranks.rank)
        with encoder_precision(precision, reader.device):
            losses, _ = detector(batch.images, batch.sizes, batch.targets)
        return losses

    detector.train()
    with torch.random.fork_rng(devices=[reader.device] if reader.device.type == "cuda" else []):
        for batch in stepper.steps(batches, state):
            # ---- a single training step -----------------------------------------------------------------------------
            lr = config.learning_rate(stepper.step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = losses_of(batch, stepper.step)
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
            # ---- end of the step ------------------------------------------------------------------------------------
            iteration = stepper.step + 1
            if not bool(parts.isfinite().all()):
                raise NonFiniteLossError(
                    f"the detector's loss became non-finite at iteration {iteration} ({parts.tolist()}); what was "
                    f"saved before is in {stepper.folder}. Lower --lr, or choose another --precision"
                )
            if iteration % _SHOW_EVERY == 0 or iteration == config.iterations:
                epoch = stepper.step * config.batch_size // len(images)
                stepper.show(epoch, float(parts.sum()), lr, config.batch_size)
        with torch.no_grad(), averaged_statistics(detector, ranks):
            further = islice(batches(config.iterations), config.precise_bn_batches)
            for number, batch in enumerate(further, start=1):
                losses_of(batch, config.iterations + number)


@contextmanager
def averaged_statistics(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """At the end, running statistics are mean and biased variance of all values that came meanwhile."""
    sums: dict[nn.BatchNorm2d, Tensor] = {}

    def add(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean, variance, count = (values.double() for values in batch_statistics(inputs[0], ranks))
        sums[norm] = sums.get(norm, 0) + count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

    hooks = [norm.register_forward_pre_hook(add) for norm in batchnorms(network)]
    yield
    for hook in hooks:
        hook.remove()
    for norm, (count, first_moment, second_moment) in sums.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(first_moment / count)
        norm.running_var.copy_(second_moment / count - (first_moment / count).square())
