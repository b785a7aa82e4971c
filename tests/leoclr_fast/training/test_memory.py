"""What a batch that does not fit is told."""

from __future__ import annotations

import pytest
import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.training.out_of_memory import OutOfMemoryError, explained_out_of_memory
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.training.test_training_step import CPU, crop_batches


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (RuntimeError("GET was unable to find an engine to execute this computation"), OutOfMemoryError),
        (RuntimeError("mat1 and mat2"), RuntimeError),
    ],
)
def test_a_batch_that_does_not_fit(error: RuntimeError, expected: type[RuntimeError]) -> None:
    config = tiny_config()
    step, (batch,) = TrainingStep(TrainingState.fresh(config, Ranks(), CPU), config, CPU), crop_batches(config, 1)
    with pytest.raises(expected) as raised, explained_out_of_memory(step, batch):
        raise error
    assert str(raised.value) == (
        str(error)
        if expected is RuntimeError
        else "a batch of 12 images does not fit the memory of cpu. Give a smaller --batch-size, more --micro-batches, "
        "--precision bf16, or more GPUs."
    )
