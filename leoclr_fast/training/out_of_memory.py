"""A batch that does not fit the GPU's memory: how large one may be."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from leoclr_fast.training.cuda_graph import is_out_of_memory
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch

_SMALL_PROBE = 8
_LARGE_PROBES = (64, 32, 16)
"""The first of them that fits is taken: the farther apart, the less it matters what the libraries take for a while."""
_SPARE_FRACTION = 0.05
_GIB = 2**30


class OutOfMemoryError(RuntimeError):
    """The batch does not fit."""


@contextmanager
def explained_out_of_memory(step: TrainingStep, batch: CropBatch) -> Iterator[None]:
    """If the GPU's memory does not suffice in here, say which batch size would fit; the training state is then void.

    Raises OutOfMemoryError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that fill the memory
    else:
        return
    advice = _advice(step, batch)
    raise OutOfMemoryError(f"a batch of {len(batch.crops)} images does not fit the memory of {step.device}. {advice}")


def largest_batch(available_bytes: float, peaks: dict[int, int]) -> int | None:
    """The most images whose step fits, from the peaks of memory of two batches that did: images -> bytes.

    The peak is taken as a constant and a share of each image; at least the larger of the two. None if the peak did not
    grow with the batch, so that nothing follows from it.
    """
    (small, small_peak), (large, large_peak) = sorted(peaks.items())
    per_image = (large_peak - small_peak) / (large - small)
    if per_image <= 0:
        return None
    constant = small_peak - small * per_image
    return max(large, int((available_bytes - constant) / per_image))


def _advice(step: TrainingStep, batch: CropBatch) -> str:
    general = "Give a smaller --batch-size, more --micro-batches, --precision bf16, or more GPUs."
    if step.training.method.ranks.world_size > 1 or len(batch.crops) <= min(_LARGE_PROBES):
        return general  # a probe would wait for the other ranks, or would not fit either
    peaks: dict[int, int] = {}
    for size in (_SMALL_PROBE, *_LARGE_PROBES):
        if len(peaks) < 2 and size < len(batch.crops):
            peak = _peak_bytes(step, batch, size)
            if peak is not None:
                peaks[size] = peak
            elif not peaks:
                return f"Not even {size} images fit. Give a smaller network or image size."
    if len(peaks) < 2:
        return f"{_SMALL_PROBE} images fit, {min(_LARGE_PROBES)} do not. {general}"
    free, total = torch.cuda.mem_get_info(step.device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(step.device)
    available = (1 - _SPARE_FRACTION) * min(allowed, free + torch.cuda.memory_reserved(step.device))
    fitting = largest_batch(available, peaks)
    if fitting is None:
        return general
    size = min(fitting, len(batch.crops) - 1)
    measured = ", ".join(f"{count} images {peak / _GIB:.2f} GiB" for count, peak in peaks.items())
    return (
        f"An estimate from measured steps ({measured}; {available / _GIB:.1f} GiB available): --batch-size {size} "
        f"would fit. {general}"
    )


def _peak_bytes(step: TrainingStep, batch: CropBatch, size: int) -> int | None:
    """Peak of the memory of a step with the first `size` images of the batch; None if they do not fit."""
    step.forget_captured()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(step.device)
    try:
        step(replace(batch, crops=batch.crops[:size], indices=batch.indices[:size]), 0.0)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return None
    torch.cuda.synchronize(step.device)
    return torch.cuda.max_memory_allocated(step.device)
