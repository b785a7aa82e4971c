"""Frozen features of a data set. Legend: B images of a global batch, N images, D features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset_tools.progress import progress
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch
from pipelines.loader import Loader

_PIXELS_AT_ONCE = 256 * 224 * 224
"""Of larger images, the network sees a part of a batch at once: its activations take no more memory."""


@torch.no_grad()
def encode_batch(
    network: nn.Module, batch: CropBatch, loader: Loader, precision: str, ranks: Ranks, *, normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs and labels of a global batch of one view, the same on every rank, on the loader's device.

    normalized: whether the rows are brought to unit length. Returns float32 [B, D] (float64 for fp64), int64 [B].
    """
    (images,) = augmented_views(
        batch, loader.views, loader.view_config, seed=loader.seed, dtype=encoder_dtype(precision)
    )
    parts = images.split(max(1, _PIXELS_AT_ONCE // (images.shape[2] * images.shape[3])))
    with encoder_precision(precision, loader.device):
        outputs = torch.cat([network(part) for part in parts])
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    outputs = F.normalize(outputs, dim=1) if normalized else outputs
    global_size = len(loader.order.global_indices(batch.epoch, batch.step))
    labels = batch.labels.to(loader.device, non_blocking=True)
    return ranks.all_gather_rows(outputs, global_size), ranks.all_gather_rows(labels, global_size)


def extract_features(
    backbone: nn.Module,
    loader: Loader,
    precision: str,
    ranks: Ranks,
    *,
    what: str = "features",
    normalized: bool = True,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of all images of a sequential loader, gathered from all ranks.

    The backbone runs in eval mode and is left as it was. what: how the progress is called. normalized: features of unit
    length. go_on: called after each batch; it may raise, on all ranks.
    Returns float32 [N, D] (float64 for fp64) on the loader's device, and int64 [N] on the host.
    """
    features, labels = torch.empty(0), torch.empty(len(loader.split), dtype=torch.int64)
    done = 0
    with ExitStack() as stack, progress(what, len(loader.split)) as advance:
        stack.callback(backbone.train, backbone.training)
        backbone.eval()
        for batch in loader.batches(epoch=0):
            outputs, batch_labels = encode_batch(backbone, batch, loader, precision, ranks, normalized=normalized)
            if done == 0:
                features = outputs.new_empty(len(loader.split), outputs.shape[1])
            rows = slice(done, done + len(outputs))
            features[rows] = outputs
            labels[rows] = batch_labels.cpu()
            done += len(outputs)
            if ranks.is_main:
                advance(len(outputs))
            go_on()
    return features, labels
