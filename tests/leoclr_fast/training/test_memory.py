"""What a batch that does not fit is told."""

from __future__ import annotations

import pytest
import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.training.test_training_step import CPU, crop_batches


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("GET was unable to find an engine to execute this computation"), torch.OutOfMemoryError),
        (RuntimeError("mat1 and mat2"), RuntimeError),
    ],
)
def test_a_batch_that_does_not_fit(
    error: RuntimeError, expected: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    config = tiny_config()
    step, (batch,) = TrainingStep(TrainingState.fresh(config, Ranks(), CPU), config, CPU), crop_batches(config, 1)
    monkeypatch.setattr(step, "_step", fails)
    with pytest.raises(expected) as raised:
        step(batch, 0.1)
    assert str(raised.value) == (
        str(error)
        if expected is RuntimeError
        else "a batch of 12 images does not fit the memory of cpu. Give a smaller --batch-size, more --micro-batches, "
        "--precision bf16, or more GPUs."
    )
