"""Frozen features of a data set. Legend: N images, D features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.distributed import Ranks
from leoclr_fast.precision import encoder_dtype, encoder_precision
from pipelines.augment import augmented_views
from pipelines.loader import Loader


@torch.no_grad()
def extract_features(backbone: nn.Module, loader: Loader, precision: str, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Unit-length features and labels of all images of a sequential loader, gathered from all ranks.

    The backbone runs in eval mode and is left as it was. Returns float32 [N, D] (float64 for fp64) on the loader's
    device, and int64 [N] on the host.
    """
    was_training = backbone.training
    backbone.eval()
    features, labels = torch.empty(0), torch.empty(len(loader.split), dtype=torch.int64)
    done = 0
    try:
        for batch in loader.batches(epoch=0):
            (images,) = augmented_views(
                batch, loader.views, loader.view_config, seed=loader.seed, dtype=encoder_dtype(precision)
            )
            with encoder_precision(precision, loader.device):
                outputs = backbone(images)
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            global_size = len(loader.order.global_indices(0, batch.step))
            if done == 0:
                features = outputs.new_empty(len(loader.split), outputs.shape[1])
            rows = slice(done, done + global_size)
            features[rows] = ranks.all_gather_rows(F.normalize(outputs, dim=1), global_size)
            labels[rows] = ranks.all_gather_rows(batch.labels.to(loader.device), global_size).cpu()
            done += global_size
    finally:
        backbone.train(was_training)
    return features, labels
