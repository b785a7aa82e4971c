"""Whole runs against plain references: Algorithm 1 of the paper, and MoCo-v2's published rule, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dataset_tools.sources import open_source
from leoclr_fast.method.methods import METHODS
from leoclr_fast.training.loop import pretrain
from pipelines.augment import augmented_views
from pipelines.factory import make_loader
from pipelines.order import TrainOrder
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.plain_reference import NUM_STEPS, PlainReference, assert_run_equals


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("leoclr", {}),
        ("leoclr", {"result__method__loss_reduction": "mean", "result__method__enqueue": "all"}),
        (
            "leoclr",
            {"result__method__key_batchnorm": "shuffle", "result__method__query_batchnorm": "split"}
            | {"result__method__query_batchnorm_group": 4},
        ),
        ("leoclr", {"result__method__key_batchnorm": "shuffle", "result__method__key_passes": "joint"}),
        ("leoclr", {"result__micro_batches": 5, "result__method__enqueue": "all"}),
        (
            "leoclr",
            {"result__micro_batches": 2, "result__method__key_batchnorm": "split"}
            | {"result__method__key_batchnorm_group": 3, "result__method__key_passes": "joint"},
        ),
        ("mocov2", {}),
        ("mocov2", {"result__method__key_batchnorm": "split"}),
    ],
    ids=[
        "leoclr",
        "leoclr-mean-enqueue-all",
        "leoclr-both-split",
        "leoclr-shuffle-joint",
        "leoclr-five-micro-batches",
        "leoclr-split-joint-two-micro-batches",
        "mocov2",
        "mocov2-split",
    ],
)
def test_every_step_equals_the_plain_reference(
    method: str, changes: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Loss, momentum buffers (so every gradient), weights, key weights, queue and pointer of each of ten steps."""
    config = tiny_config(method, monitor__checkpoint_every_steps=1, monitor__keep_checkpoints=100, **changes)
    pretrain(config, tiny_data, tmp_path / "run", max_steps=NUM_STEPS)
    assert_run_equals(PlainReference(config), config, tiny_data, tmp_path / "run")


def test_query_and_key_of_mocov2_are_leoclrs_crops(tiny_data: Path) -> None:
    """Both methods see the same crops, with the same photometry: the comparison is of methods."""
    split = open_source(tiny_data).splits["train"]
    order = TrainOrder(num_images=len(split), batch_size=12, seed=0)
    config = tiny_config()
    seen = {}
    for name, method in METHODS.items():
        with make_loader(
            split, method.views, config.result.views, config.speed.loader, order, seed=0, device=torch.device("cpu")
        ) as loader:
            batch = next(iter(loader.batches(1)))
            seen[name] = augmented_views(batch, method.views, config.result.views, seed=0)
    assert torch.equal(seen["leoclr"][1], seen["mocov2"][0])
    assert torch.equal(seen["leoclr"][2], seen["mocov2"][1])
    assert F.mse_loss(seen["leoclr"][0], seen["leoclr"][1]) > 0.01
