"""What a training step must communicate, by counting: collectives and bytes of each kind, for any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from leoclr_fast.config import ResultConfig, SpeedConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.key_schedule import KeySchedule
from leoclr_fast.method.methods import METHODS
from pipelines.augment import draw_augmentation

_CROP_CHANNELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicationVolume:
    """Of one step, on the first rank; the kinds and their bytes are those of `CommunicationMeter`."""

    calls: dict[str, int]
    bytes: dict[str, int]
    wire_bytes: float
    """What the first rank sends, by the usual ring: of a sum 2 (n - 1) / n of its bytes, of a gather or an exchange
    (n - 1) / n."""


def communication_volume(result: ResultConfig, speed: SpeedConfig, num_ranks: int) -> CommunicationVolume:
    """The volume of a step of `result` on so many ranks. Nothing is measured here."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    if num_ranks == 1:
        return CommunicationVolume(calls={}, bytes={}, wire_bytes=0.0)
    layout = BatchLayout(batch_size=result.batch_size, micro_batches=result.micro_batches, world_size=num_ranks)
    schedule = KeySchedule(result.method, layout, len(METHODS[result.method.name].views) - 1)
    item = 8 if speed.precision == "fp64" else 4
    with torch.device("meta"):
        encoder = Encoder(result.backbone, result.method.projection_dim)
    norms = [module.num_features for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]

    def add(kind: str, num_calls: int, num_bytes: int) -> None:
        calls[kind] += num_calls
        size[kind] += num_bytes

    num_gradients = sum(weight.numel() for weight in encoder.parameters())
    num_statistics = 0 if result.method.query_batchnorm == "sync" else 2 * sum(norms)
    if speed.gradient_compression == "none":
        add("all_reduce", 1, item * (num_gradients + num_statistics))
    else:
        add("all_reduce", 1, 2 * num_gradients)
        if num_statistics:
            add("all_reduce", 1, item * num_statistics)
    add("all_gather", 1, num_ranks * schedule.largest * result.method.projection_dim * item)
    if schedule.exchanges:
        table = draw_augmentation(METHODS[result.method.name].views, result.views, 0, 0, np.arange(1)).table
        row = _CROP_CHANNELS * result.views.image_size**2 + table.shape[1] * table.element_size()
        add("all_to_all", 1, layout.local_size * schedule.num_keys * row)
    gathered = item * num_ranks * sum(2 * channels + 1 for channels in norms)
    if result.method.key_batchnorm == "sync":
        num_passes = len(schedule.pass_sizes)
        add("all_gather", num_passes * len(norms), num_passes * gathered)
    if result.method.query_batchnorm == "sync":
        add("all_gather", result.micro_batches * len(norms), result.micro_batches * gathered)
        add("all_reduce", result.micro_batches * len(norms), result.micro_batches * 2 * item * sum(norms))
    others = (num_ranks - 1) / num_ranks
    wire_bytes = others * (2 * size["all_reduce"] + size["all_gather"] + size["all_to_all"])
    return CommunicationVolume(calls=dict(calls), bytes={k: v for k, v in size.items() if v}, wire_bytes=wire_bytes)
