"""What travels from the data layer to the training step. Legend: B images, V views, S side of a view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipelines.crops import Boxes


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBatch:
    """Crops of one batch, before photometric augmentation. Geometry is done by the loader, photometry is not."""

    crops: Tensor
    """uint8 [B, V, S, S, 3] on the device, RGB."""
    labels: Tensor
    """int64 [B] on the host; -1 = unlabelled."""
    indices: npt.NDArray[np.int64]
    """int64 [B]: index of each image in its split; of the substitute where an image could not be read."""
    boxes: Boxes
    """int32 [B, V, 8]: the placed box of each view, see `pipelines.crops`, pixels."""
    epoch: int
    step: int
