"""A batch that does not fit the GPU's memory, said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from leoclr_fast.training.cuda_graph import is_out_of_memory
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch


class OutOfMemoryError(RuntimeError):
    """The batch does not fit."""


@contextmanager
def explained_out_of_memory(step: TrainingStep, batch: CropBatch) -> Iterator[None]:
    """If the GPU's memory does not suffice in here, say what takes less; the training state is then void.

    Raises OutOfMemoryError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"a batch of {len(batch.crops)} images does not fit the memory of {step.device}. Give a smaller "
            "--batch-size, more --micro-batches, --precision bf16, or more GPUs."
        ) from error
