"""MoCo-v2 out of lightly's own modules and loss (PyPI: lightly, our extra `peers`), put together as its guide does."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from benchmarks.baselines.mocov2_peer import MoCoV2Peer
from leoclr_fast.method.backbone import build_backbone


class LightlyMoCoV2(MoCoV2Peer):
    """lightly's projection head, `NTXentLoss` with its memory bank, `update_momentum` and `batch_shuffle`, around the
    same ResNet. Raises ImportError, saying how to install it, where lightly is missing.
    """

    name = "lightly MoCo-v2"

    def build(self) -> None:
        try:
            from lightly.loss import NTXentLoss
            from lightly.models.modules import MoCoProjectionHead
            from lightly.models.utils import deactivate_requires_grad
        except ImportError as error:
            raise ImportError(f"lightly is missing ({error}): pip install 'leoclr-fast[peers]'") from error
        method = self.result.method
        self._backbone = build_backbone(self.result.backbone)
        dim = self._backbone.feature_dim
        self._head = MoCoProjectionHead(dim, dim, method.projection_dim)
        self._key_backbone, self._key_head = deepcopy(self._backbone), deepcopy(self._head)
        deactivate_requires_grad(self._key_backbone)
        deactivate_requires_grad(self._key_head)
        self._criterion = NTXentLoss(
            temperature=method.temperature, memory_bank_size=(method.queue_size, method.projection_dim)
        )

    def modules(self) -> list[nn.Module]:
        return [self._backbone, self._head, self._key_backbone, self._key_head, self._criterion]

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*self._backbone.parameters(), *self._head.parameters()]

    def loss(self, query_view: Tensor, key_view: Tensor) -> Tensor:
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        momentum = self.result.method.key_momentum
        update_momentum(self._backbone, self._key_backbone, m=momentum)
        update_momentum(self._head, self._key_head, m=momentum)
        query = self._head(self._backbone(query_view).flatten(start_dim=1))
        shuffled, order = batch_shuffle(key_view)
        key = self._key_head(self._key_backbone(shuffled).flatten(start_dim=1)).detach()
        loss: Tensor = self._criterion(query, batch_unshuffle(key, order))
        return loss
