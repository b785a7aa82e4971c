"""Whole runs against plain references: Algorithm 1 of the paper, and MoCo-v2's published rule, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.plain_reference import NUM_STEPS, PlainReference, assert_run_equals

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "leoclr": ("leoclr", {}),
    "leoclr-mean-enqueue-all": ("leoclr", {"result__method__loss_reduction": "mean", "result__method__enqueue": "all"}),
    "leoclr-both-split": (
        "leoclr",
        {
            "result__method__key_batchnorm": "shuffle",
            "result__method__query_batchnorm": "split",
            "result__method__query_batchnorm_group": 4,
        },
    ),
    "leoclr-shuffle-joint": (
        "leoclr",
        {"result__method__key_batchnorm": "shuffle", "result__method__key_passes": "joint"},
    ),
    "leoclr-five-micro-batches": ("leoclr", {"result__micro_batches": 5, "result__method__enqueue": "all"}),
    "leoclr-split-joint-two-micro-batches": (
        "leoclr",
        {
            "result__micro_batches": 2,
            "result__method__key_batchnorm": "split",
            "result__method__key_batchnorm_group": 3,
            "result__method__key_passes": "joint",
        },
    ),
    "mocov2": ("mocov2", {}),
    "mocov2-split": ("mocov2", {"result__method__key_batchnorm": "split"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_the_plain_reference(case: str, tiny_data: Path, tmp_path: Path) -> None:
    """Loss, momentum buffers (so every gradient), weights, key weights, queue and pointer of each of ten steps."""
    method, changes = CASES[case]
    config = tiny_config(method, monitor__checkpoint_every_steps=1, monitor__keep_checkpoints=100, **changes)
    pretrain(config, tiny_data, tmp_path / "run", max_steps=NUM_STEPS)
    assert_run_equals(PlainReference(config), config, tiny_data, tmp_path / "run")
