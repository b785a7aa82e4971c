"""Small data sets, decoded once and resident on the device; every view is cut there. For CIFAR-10 and STL-10."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.batch import CropBatch
from pipelines.crop_resize import crop_resize
from pipelines.loader import Loader
from pipelines.resident_images import load_resident_images
from pipelines.views import draw_boxes


class ResidentLoader(Loader):
    """One decode per image and run. Raises ValueError if the decoded split does not fit in memory."""

    name = "resident"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resident = load_resident_images(self.split, self.device, self.config.workers)
        self._num_decodes = self._resident.num_decodes
        for index, reason in self._resident.unreadable.items():
            self.report_unreadable(index, reason)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        images = self._resident.images
        labels = self.split.labels
        for step in range(start_step, self.steps_per_epoch):
            indices = self._resident.source_index[self.order.indices(epoch, step)]
            boxes = draw_boxes(
                self.views, self.view_config, images.heights[indices], images.widths[indices], self.seed, epoch, indices
            )
            rows = np.repeat(indices, len(self.views))
            crops = crop_resize(images, rows, boxes.reshape(-1, 4), self.view_config.image_size)
            yield CropBatch(
                crops=crops.unflatten(0, (len(indices), len(self.views))),
                labels=torch.from_numpy(labels[indices]),
                indices=indices,
                boxes=boxes,
                epoch=epoch,
                step=step,
            )
