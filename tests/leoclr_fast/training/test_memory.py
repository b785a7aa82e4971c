"""What a batch that does not fit is told, with a GPU's numbers put in place of a GPU's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.training import out_of_memory as memory
from leoclr_fast.training.out_of_memory import OutOfMemoryError, explained_out_of_memory, largest_batch
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from tests.leoclr_fast.conftest import tiny_config

CPU = torch.device("cpu")
GIB = 2**30
GENERAL = "Give a smaller --batch-size, more --micro-batches, --precision bf16, or more GPUs."

Told = Callable[..., tuple[str, list[int]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What a batch of so many images is told, where a step of n images has the peak ``peak(n)`` in GiB and the GPU has
    9.5 GiB to give; and the sizes that were tried.
    """

    def told_of(size: int, peak: Callable[[int], float], most: float = np.inf) -> tuple[str, list[int]]:
        """most: the images that fit."""
        config = tiny_config(speed__precision="fp32", result__method__queue_size=96, result__batch_size=96)
        step = TrainingStep(TrainingState.fresh(config, Ranks(), CPU), config, CPU)
        tried: list[int] = []

        def tried_step(batch: CropBatch, lr: float) -> None:
            tried.append(len(batch.crops))
            if tried[-1] > most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(TrainingStep, "__call__", lambda _, batch, lr: tried_step(batch, lr))
        for name, value in {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda _: None,
            "synchronize": lambda _: None,
            "max_memory_allocated": lambda _: int(peak(tried[-1]) * GIB),
            "memory_reserved": lambda _: 4 * GIB,
            "get_per_process_memory_fraction": lambda _: 1.0,
            "mem_get_info": lambda _: (6 * GIB, 80 * GIB),
        }.items():
            monkeypatch.setattr(memory.torch.cuda, name, value)
        boxes = np.zeros((size, 3, 4), dtype=np.int32)
        crops = torch.zeros(size, 3, 16, 16, 3, dtype=torch.uint8)
        batch = CropBatch(crops=crops, labels=torch.zeros(size), indices=np.arange(size), boxes=boxes, epoch=0, step=0)
        with pytest.raises(OutOfMemoryError) as error, explained_out_of_memory(step, batch):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return str(error.value), tried

    return told_of


def test_largest_batch_from_two_that_fit() -> None:
    assert largest_batch(1000, {8: 180, 16: 260}) == 90  # 100 and 10 an image
    assert largest_batch(1000, {16: 260, 8: 180}) == 90
    assert largest_batch(90, {8: 180, 16: 260}) == 16  # it did fit
    assert largest_batch(1000, {8: 260, 64: 260}) is None
    assert largest_batch(1000, {8: 260, 64: 180}) is None


def test_the_message_says_what_would_fit_and_that_it_is_an_estimate(told: Told) -> None:
    message, tried = told(96, lambda images: 1 + images / 10)
    assert tried == [8, 64]
    assert message == (
        "a batch of 96 images does not fit the memory of cpu. An estimate from measured steps (8 images 1.80 GiB, "
        f"64 images 7.40 GiB; 9.5 GiB available): --batch-size 85 would fit. {GENERAL}"
    )


def test_what_is_taken_for_a_while_does_not_turn_the_estimate(told: Told) -> None:
    """From 8 to 16 images the peak falls here; to 64 it grows."""
    message, _ = told(96, lambda images: {8: 2.5, 16: 2.4}.get(images, 1 + images / 10))
    assert re.search(r"--batch-size 88 would fit", message)


@pytest.mark.parametrize("peak", [lambda _: 3.0, lambda images: 4 - images / 100])
def test_peaks_that_do_not_grow_say_nothing(told: Told, peak: Callable[[int], float]) -> None:
    message, _ = told(96, peak)
    assert message == f"a batch of 96 images does not fit the memory of cpu. {GENERAL}"


@pytest.mark.parametrize(
    ("size", "most", "tried", "said"),
    [
        (96, 40, [8, 64, 32], "32 images 4.20 GiB; 9.5 GiB available): --batch-size 85 would fit"),
        (64, 63, [8, 32], "--batch-size 63 would fit"),
        (96, 9, [8, 64, 32, 16], f"8 images fit, 16 do not. {GENERAL}"),
        (96, 7, [8], "Not even 8 images fit. Give a smaller network or image size."),
        (16, 15, [], GENERAL),
    ],
)
def test_the_probes_are_smaller_than_the_batch_and_than_the_memory(
    told: Told, size: int, most: int, tried: list[int], said: str
) -> None:
    message, sizes = told(size, lambda images: 1 + images / 10, most)
    assert sizes == tried
    assert said in message


def test_the_probes_are_real_steps(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step = TrainingStep.__call__
    done: list[int] = []

    def counted(step: TrainingStep, batch: CropBatch, size: int) -> int:
        real_step(step, replace(batch, crops=batch.crops[:size], indices=batch.indices[:size]), 0.0)
        done.append(step.training.step)
        return size * GIB

    monkeypatch.setattr(memory, "_peak_bytes", counted)
    told(96, lambda _: 0.0)
    assert done == [1, 2]


def test_nothing_happens_without_an_error() -> None:
    with explained_out_of_memory(None, None):  # type: ignore[arg-type]
        pass
