"""A captured step of two ranks, NCCL's collectives in the graph, against the eager one. It has not run yet: nobody has
lent two GPUs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.held_port import held_port
from tests.leoclr_fast.rank_program import noise_batches
from tests.tolerances import CAPTURED_FIRST_LOSSES, CAPTURED_LOSS

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two CUDA devices"),
]

NUM_RANKS, NUM_STEPS = 2, 30


def train(graph: str, batchnorm: dict[str, Any], rank: int) -> Tensor:
    """The loss over both ranks in each step, on the host."""
    config = tiny_config(
        speed__device="cuda", speed__precision="bf16", speed__cuda_graph=graph, speed__compile="off", **batchnorm
    )
    with process_group("cuda") as (ranks, device):
        assert ranks.rank == rank
        step = TrainingStep(TrainingState.fresh(config, ranks, device), config, device)
        torch.backends.cudnn.benchmark = False  # the step has switched it on
        torch.backends.cudnn.deterministic = True
        batches = [replace(b, crops=b.crops.to(device)) for b in noise_batches(config, ranks, NUM_STEPS)]
        metrics = torch.stack([step(batch, config.result.lr) for batch in batches])
        ranks.all_reduce_sum([metrics])
        return metrics[:, 0].cpu()


def run_rank(rank: int, ports: list[int], batchnorm: dict[str, Any], out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1"}
    losses = {}
    for graph, port in zip(("off", "on"), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        losses[graph] = train(graph, batchnorm, rank)
    torch.save(losses, Path(out) / f"{rank}.pt")


@pytest.mark.parametrize("norms", [("shuffle", "plain"), ("sync", "sync"), ("ema", "plain")], ids="-".join)
def test_captured_steps_are_eager_ones(norms: tuple[str, str], tmp_path: Path) -> None:
    """norms: the batch-norm of the key encoder, and that of the query encoder."""
    batchnorm = dict(zip(("result__method__key_batchnorm", "result__method__query_batchnorm"), norms, strict=True))
    with held_port() as first, held_port() as second:
        multiprocessing.spawn(run_rank, args=([first, second], batchnorm, str(tmp_path)), nprocs=NUM_RANKS)
    for rank in range(NUM_RANKS):
        losses = torch.load(tmp_path / f"{rank}.pt")
        difference = (losses["on"] / losses["off"] - 1).abs()
        assert losses["on"].unique().numel() > 0.9 * NUM_STEPS  # every replay met new inputs
        assert difference[:5].max() <= CAPTURED_FIRST_LOSSES["bf16"]
        assert difference.max() <= CAPTURED_LOSS["bf16"]
