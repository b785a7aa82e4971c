"""Gradient accumulation: what a step of several micro-batches shares with one of the whole batch, and what it cannot.

`test_algorithm` and `test_many_ranks` compare it with a plain reference.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leoclr_fast.config import ResultConfig, RunConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.training.state import TrainingState
from pipelines.batch import CropBatch
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.rank_program import CPU, noise_batches
from tests.leoclr_fast.training.test_training_step import first_images, train


def train_frozen(config: RunConfig, batches: list[CropBatch]) -> tuple[TrainingState, Tensor]:
    """The query's batch-norm takes its running statistics, as an evaluation does."""
    training = TrainingState.fresh(config, Ranks(), CPU)
    training.method.query_encoder.eval()
    return train(config, batches, training=training)


class TestWithoutBatchStatistics:
    """Where no batch-norm looks at the batch, any number of micro-batches is the whole batch."""

    @pytest.mark.parametrize("micro_batches", [2, 5, 12])
    def test_equals_the_whole_batch(self, micro_batches: int) -> None:
        """Metrics of six steps, and every tensor after them, to 1e-12; queue and optimizer move once a step."""
        config = tiny_config(result__method__key_batchnorm="ema", result__method__enqueue="all")
        batches = noise_batches(config, Ranks(), 6)
        whole, expected = train_frozen(config, batches)
        split = tiny_config(
            result__method__key_batchnorm="ema", result__method__enqueue="all", result__micro_batches=micro_batches
        )
        parts, metrics = train_frozen(split, batches)
        torch.testing.assert_close(metrics, expected, rtol=1e-12, atol=1e-13)
        assert parts.step == whole.step == 6
        assert int(parts.method.queue.pointer) == 6 * 24 % 40
        for ours, theirs in zip(parts.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(1.0, theirs.abs().max().item()))

    def test_an_uneven_last_batch(self) -> None:
        """Seven images in three parts, and two images in as many as there are."""
        config = tiny_config(result__method__key_batchnorm="ema")
        batches = [
            first_images(batch, size) for batch, size in zip(noise_batches(config, Ranks(), 3), (12, 7, 2), strict=True)
        ]
        _, expected = train_frozen(config, batches)
        _, metrics = train_frozen(tiny_config(result__method__key_batchnorm="ema", result__micro_batches=3), batches)
        torch.testing.assert_close(metrics, expected, rtol=1e-12, atol=1e-13)


def test_batch_norm_sees_a_part_at_a_time() -> None:
    """So the result is another one, and the query's running statistics move once for each part."""
    config = tiny_config()
    batches = noise_batches(config, Ranks(), 2)
    whole, expected = train(config, batches)
    parts, metrics = train(tiny_config(result__micro_batches=3), batches)
    loss = 0
    assert abs(metrics[0, loss] / expected[0, loss] - 1) > 1e-4
    tracked = [
        int(state.method.query_encoder.backbone.bn1.num_batches_tracked)  # type: ignore[union-attr, arg-type]
        for state in (whole, parts)
    ]
    assert tracked == [2, 6]


def test_an_overflow_in_fp16_skips_one_step_of_all_parts() -> None:
    """The scale is halved once, whatever the number of parts; the weights stay and the queue moves."""
    config = tiny_config(speed__precision="fp16", result__micro_batches=3)
    fresh = TrainingState.fresh(config, Ranks(), CPU)
    training, metrics = train(config, noise_batches(config, Ranks(), 1))
    assert not metrics[0, -1].isfinite()
    assert metrics[0, 0].isfinite()
    assert training.scaler.get_scale() == fresh.scaler.get_scale() / 2
    for ours, before in zip(
        training.method.query_encoder.parameters(), fresh.method.query_encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, before)
    assert int(training.method.queue.pointer) == 12


def test_no_parts_or_more_than_images() -> None:
    with pytest.raises(ValueError, match="13 micro-batches are not allowed for a batch of 12: give"):
        ResultConfig(batch_size=12, micro_batches=13)
    with pytest.raises(ValueError, match="micro batches 0 is not allowed: give at least 1"):
        ResultConfig(batch_size=12, micro_batches=0)
