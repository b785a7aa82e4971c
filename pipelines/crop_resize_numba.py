"""`crop_resize` for CPUs, compiled by numba: one thread per box, exact for boxes of any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from torch import Tensor

from pipelines.box_resize import resize_boxes, scratch_size
from pipelines.crop_resize import PackedImages
from pipelines.numba_kernel import compile_kernel, run_in_threads

_SHARES = 8  # that each thread takes, about: some threads are slower than others


def crop_resize_numba(
    images: PackedImages,
    rows: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int32],
    output_size: int,
    num_threads: int,
) -> Tensor:
    """`pipelines.crop_resize.crop_resize` for pixels on the CPU and boxes that are inside their images."""
    output = np.empty((len(rows), output_size, output_size, 3), dtype=np.uint8)
    if output.size == 0:
        return torch.from_numpy(output)
    pixels, target = images.pixels.numpy(), output.view(np.int8).reshape(-1)
    heights, widths = images.heights[rows], images.widths[rows]
    top, left, box_heights, box_widths = boxes.astype(np.int64).T
    pixel = 1 if images.planar else 3  # bytes from a column to the next
    geometry = np.stack(
        (
            images.offsets[rows] + (top * widths + left) * pixel,
            widths * pixel,
            heights * widths * images.planar,
            box_heights,
            box_widths,
        ),
        axis=1,
    )
    needed = scratch_size(int(box_heights.max()), int(box_widths.max()), output_size)
    kernel = compiled_kernel()

    # Dealt out from the largest box to the smallest, so that all shares are about the same work.
    num_threads = max(1, min(num_threads, len(rows)))
    by_work = np.argsort(-(box_heights * np.maximum(box_widths, output_size)), kind="stable")
    num_shares = min(len(rows), _SHARES * num_threads) if num_threads > 1 else 1
    shares = iter([np.ascontiguousarray(by_work[share::num_shares]) for share in range(num_shares)])

    def work() -> None:
        scratch = np.empty(needed, dtype=np.uint32)
        for numbers in shares:
            kernel(pixels, geometry, numbers, output_size, target, scratch)

    run_in_threads(work, num_threads)
    return torch.from_numpy(output)


@cache
def compiled_kernel() -> Callable[..., None]:
    """`resize_boxes` as machine code, from numba's cache on the disk where there is one."""
    integers = types.int64[::1]
    # The output is int8: FFCV makes numba's one and only type of uint8 arrays read-only.
    signature = types.void(
        types.uint8[::1], types.int64[:, ::1], integers, types.int64, types.int8[::1], types.uint32[::1]
    )
    return compile_kernel(resize_boxes, signature, "the resize")
