"""The same random crops at every step: no decode, no resize. The ceiling of a training step, never a data set."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from pipelines.crops import squashed
from pipelines.loader import DecodedBatch, Loader


class SyntheticLoader(Loader):
    """Fixed uint8 crops, made once on the device; indices and labels are those of the order."""

    name = "synthetic"
    shows_images = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = self.view_config.image_size
        shape = (self.order.max_local_batch_size, len(self.views), size, size, 3)
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        self._crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        self._box = squashed(np.array([0, 0, size, size], dtype=np.int32), size)

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        for step in range(start_step, self.steps_per_epoch):
            indices = self.order.indices(epoch, step)
            boxes = np.broadcast_to(self._box, (len(indices), len(self.views), 8))
            yield DecodedBatch(self._crops[: len(indices)], indices, boxes)
