"""Decoded images of any size in one buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedImages:
    """Decoded images of any size in one buffer.

    The geometry stays on the host, where the boxes are drawn; only pixels live on the device.
    """

    pixels: Tensor
    """uint8 [total bytes], each image as [height, width, 3] RGB, or as [3, height, width] where `planar`."""
    offsets: npt.NDArray[np.int64]
    """int64 [N]: first byte of each image."""
    heights: npt.NDArray[np.int64]
    """int64 [N], pixels."""
    widths: npt.NDArray[np.int64]
    """int64 [N], pixels."""
    planar: bool = False

    @classmethod
    def side_by_side(
        cls, pixels: Tensor, heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], *, planar: bool = False
    ) -> PackedImages:
        """Images that lie behind one another without gaps."""
        sizes = 3 * heights * widths
        return cls(pixels=pixels, offsets=np.cumsum(sizes) - sizes, heights=heights, widths=widths, planar=planar)

    def __len__(self) -> int:
        return len(self.offsets)
