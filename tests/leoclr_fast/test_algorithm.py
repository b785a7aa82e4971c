"""Whole runs against plain references: Algorithm 1 of the paper, and MoCo-v2's published rule, in float64.

The references share nothing with ours but the encoders' architecture and the views: cross entropies over explicit
logits, a queue with D x K columns, moving averages parameter by parameter, SGD by hand.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset_tools.sources import open_source
from leoclr_fast.backbone import Encoder
from leoclr_fast.checkpoint import load_checkpoint
from leoclr_fast.config import RunConfig
from leoclr_fast.methods import METHODS, build_method
from leoclr_fast.run_folder import RunFolder
from leoclr_fast.train import pretrain
from pipelines.augment import augmented_views
from pipelines.counter_rng import KEY_SHUFFLE_STREAM, permutation
from pipelines.factory import make_loader
from pipelines.order import TrainOrder
from tests.leoclr_fast.conftest import tiny_config

NUM_STEPS = 10
RELATIVE = 1e-10


class PlainReference:
    """Algorithm 1, as one would write it from the paper; with one key view it is MoCo-v2."""

    def __init__(self, config: RunConfig, slices: Sequence[int] = ()) -> None:
        """slices: images of each rank, whose batch-norms see only those; one rank if not given."""
        self.slices = list(slices) or [config.result.batch_size]
        start = build_method(config.result.backbone, config.result.method, config.result.seed).double()
        self.config = config
        self.f_q = Encoder(config.result.backbone, config.result.method.projection_dim).double()
        self.f_q.load_state_dict(start.query_encoder.state_dict())
        self.f_k = deepcopy(self.f_q)
        self.queue = start.queue.keys.T.clone()  # [D, K], as moco's
        self.pointer = 0
        self.velocity: dict[str, Tensor] = {}

    def keys(self, images: Tensor, step: int, number: int) -> Tensor:
        """One pass of the momentum encoder in training mode, over shuffled groups where the mode says so."""
        method = self.config.result.method
        if method.key_batchnorm == "plain":
            return torch.cat([self.f_k(part) for part in images.split(self.slices)])
        order = torch.from_numpy(permutation(self.config.result.seed, step, len(images), KEY_SHUFFLE_STREAM + number))
        if len(self.slices) > 1:
            groups = images[order].split(self.slices)
        else:
            groups = images[order].tensor_split(max(1, len(images) // method.key_batchnorm_group))
        shuffled = torch.cat([self.f_k(group) for group in groups])
        return shuffled[torch.argsort(order)]

    def step(self, views: tuple[Tensor, ...], step: int, lr: float) -> float:
        """views: query view, then key views. Returns the loss."""
        method = self.config.result.method
        x, *crops = views
        with torch.no_grad():
            for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
                p_k.copy_(p_k * method.key_momentum + p_q * (1 - method.key_momentum))
            if method.key_passes == "joint":
                k = list(self.keys(torch.cat(crops), step, 0).chunk(len(crops)))
            else:
                k = [self.keys(crop, step, number) for number, crop in enumerate(crops)]
        q = torch.cat([self.f_q(part) for part in x.split(self.slices)])
        losses = []
        for k_i in k:
            l_pos = torch.einsum("nc,nc->n", [q, k_i]).unsqueeze(-1)
            l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone()])
            logits = torch.cat([l_pos, l_neg], dim=1) / method.temperature
            losses.append(nn.CrossEntropyLoss()(logits, torch.zeros(len(q), dtype=torch.long)))
        loss = sum(losses, torch.zeros((), dtype=torch.float64))
        if method.loss_reduction == "mean":
            loss = loss / len(losses)
        self.f_q.zero_grad()
        loss.backward()
        optimizer = self.config.result.optimizer
        with torch.no_grad():
            for name, weight in self.f_q.named_parameters():
                assert weight.grad is not None
                direction = weight.grad + optimizer.weight_decay * weight
                if name in self.velocity:
                    direction = optimizer.momentum * self.velocity[name] + direction
                self.velocity[name] = direction.clone()
                weight -= lr * direction
            for k_i in k if method.enqueue == "all" else k[:1]:
                for key in k_i:  # one by one around the ring
                    self.queue[:, self.pointer] = key
                    self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss.item()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("leoclr", {}),
        ("leoclr", {"result__method__loss_reduction": "mean", "result__method__enqueue": "all"}),
        ("leoclr", {"result__method__key_batchnorm": "split"}),
        ("leoclr", {"result__method__key_batchnorm": "shuffle", "result__method__key_passes": "joint"}),
        ("mocov2", {}),
        ("mocov2", {"result__method__key_batchnorm": "split"}),
    ],
    ids=["leoclr", "leoclr-mean-enqueue-all", "leoclr-split", "leoclr-shuffle-joint", "mocov2", "mocov2-split"],
)
def test_ten_steps_equal_the_plain_reference(
    method: str, changes: dict[str, str], tiny_data: Path, tmp_path: Path
) -> None:
    """Loss, momentum buffers (so every gradient), weights, key weights, queue and pointer of each of ten steps."""
    config = tiny_config(method, monitor__checkpoint_every_steps=1, monitor__keep_checkpoints=100, **changes)
    pretrain(config, tiny_data, tmp_path / "run", max_steps=NUM_STEPS)
    assert_run_equals(PlainReference(config), config, tiny_data, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"result__method__key_batchnorm": "plain", "result__batch_size": 11},
        {"result__method__key_batchnorm": "shuffle", "result__batch_size": 11},
    ],
    ids=["plain", "shuffle"],
)
def test_three_ranks_equal_the_plain_reference(changes: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    """11 images on three gloo ranks, as 4, 4, 3: the loss and the gradient are means over the global batch, each rank
    has its own batch-norm, keys are shuffled between the ranks and enqueued in the order of the images.
    """
    changes = {"monitor__checkpoint_every_steps": 1, "monitor__keep_checkpoints": 100, **changes}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    program = ["-m", "tests.leoclr_fast.tiny_run", str(tiny_data), str(tmp_path / "run"), str(NUM_STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *program, json.dumps(changes)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = tiny_config(**changes)
    assert_run_equals(PlainReference(config, slices=(4, 4, 3)), config, tiny_data, tmp_path / "run")


def assert_run_equals(reference: PlainReference, config: RunConfig, data: Path, run: Path) -> None:
    """Compare a run folder with a checkpoint for each step."""
    records = RunFolder(run).read_metrics("step")
    assert len(records) == NUM_STEPS
    batch_size, method = config.result.batch_size, config.result.method.name
    split = open_source(data).splits["train"]
    order = TrainOrder(num_images=len(split), batch_size=batch_size, seed=0)
    views, view_config = METHODS[method].views, config.result.views
    with make_loader(
        split, views, view_config, config.speed.loader, order, seed=0, device=torch.device("cpu")
    ) as loader:
        batches = [batch for epoch in range(4) for batch in loader.batches(epoch)][:NUM_STEPS]
    for step, (batch, record) in enumerate(zip(batches, records, strict=True)):
        images = augmented_views(batch, views, view_config, seed=0, dtype=torch.float64)
        decay = 0.5 * (1 + math.cos(math.pi * (step // 3) / 4))
        lr = 0.6 * batch_size / 256 * decay
        loss = reference.step(images, step, lr)
        assert record["loss"] == pytest.approx(loss, rel=RELATIVE)
        assert record["lr"] == pytest.approx(lr, rel=RELATIVE)

        state = load_checkpoint(run / "checkpoints" / f"step-{step + 1:08d}")
        ours = state["method"]
        for name, weight in reference.f_q.named_parameters():
            assert_close(ours[f"query_encoder.{name}"], weight, name)
        for name, weight in reference.f_k.named_parameters():
            assert_close(ours[f"key_encoder.{name}"], weight, f"key {name}")
        for velocity, buffer in zip(reference.velocity.values(), state["optimizer"]["state"].values(), strict=True):
            assert_close(buffer["momentum_buffer"], velocity, "momentum buffer")
        assert_close(ours["queue.keys"], reference.queue.T, "queue")
        assert int(ours["queue.pointer"]) == reference.pointer
    assert NUM_STEPS * batch_size > 40  # the queue has wrapped around


def assert_close(ours: Tensor, truth: Tensor, what: str) -> None:
    """Relative to the largest entry of the truth; a bias that is still zero must be exactly zero."""
    error, size = (ours - truth).abs().max().item(), truth.abs().max().item()
    assert error <= RELATIVE * size, f"{what}: error {error:.2e} beside values up to {size:.2e}"


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
