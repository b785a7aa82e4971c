"""The MoCo-v2 training loop as published, written anew from the papers' algorithm (He et al. 2020, Algorithm 1; Chen et
al. 2020).

Legend: B images, D projection, K keys in the queue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines.mocov2_peer import MoCoV2Peer
from leoclr_fast.method.backbone import build_backbone
from pipelines.batch import CropBatch


class PublishedMoCoV2(MoCoV2Peer):
    """Batch-norm over one GPU's shuffled batch, a moving average parameter by parameter, a queue [D, K] whose pointer
    the host reads, cross entropy over concatenated logits, and the loss read every step for the progress line.

    The published loop also computes top-1 and top-5 accuracy of every batch; that is left out here, in its favour.
    cuDNN chooses its algorithms by trial, as published.
    """

    name = "published MoCo-v2 loop"

    def build(self) -> None:
        method = self.result.method
        if method.queue_size % self.result.batch_size:
            raise ValueError(
                f"the published loop cannot wrap its queue around: {method.queue_size} keys are no multiple of the "
                f"batch size {self.result.batch_size}"
            )
        self._query_encoder, self._key_encoder = self._encoder(), self._encoder()
        self._key_encoder.load_state_dict(self._query_encoder.state_dict())
        self._key_encoder.requires_grad_(False)
        self._queue = _Queue(method.projection_dim, method.queue_size)

    def modules(self) -> list[nn.Module]:
        return [self._query_encoder, self._key_encoder, self._queue]

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self._query_encoder.parameters())

    def step(self, batch: CropBatch) -> None:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, deterministic=False, allow_tf32=torch.backends.cudnn.allow_tf32
        ):
            super().step(batch)

    def loss(self, query_view: Tensor, key_view: Tensor) -> Tensor:
        query = F.normalize(self._query_encoder(query_view), dim=1)  # [B, D]
        with torch.no_grad():
            self._update_key_encoder()
            order = torch.randperm(len(key_view), device=key_view.device)
            shuffled_key = F.normalize(self._key_encoder(key_view[order]), dim=1)
            key = shuffled_key[torch.argsort(order)]  # [B, D]
        positive = torch.einsum("bd,bd->b", query, key)[:, None]  # [B, 1]
        negative = torch.einsum("bd,dk->bk", query, self._queue.keys.clone().detach())  # [B, K]
        logits = torch.cat([positive, negative], dim=1) / self.result.method.temperature
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        self._enqueue(key)
        return F.cross_entropy(logits, labels)

    def after_step(self, loss: Tensor) -> None:
        self.last_loss = loss.item()

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        momentum = self.result.method.key_momentum
        for query, key in zip(self._query_encoder.parameters(), self._key_encoder.parameters(), strict=True):
            key.data = key.data * momentum + query.data * (1.0 - momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        start = int(self._queue.pointer)
        self._queue.keys[:, start : start + len(keys)] = keys.T
        self._queue.pointer[0] = (start + len(keys)) % self.result.method.queue_size

    def _encoder(self) -> nn.Sequential:
        backbone = build_backbone(self.result.backbone)
        dim = backbone.feature_dim
        head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, self.result.method.projection_dim))
        return nn.Sequential(backbone, head)


class _Queue(nn.Module):
    keys: Tensor
    pointer: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
