"""Algorithm 1 of the paper and MoCo-v2's published rule, written plainly in float64, and a run compared with them.

It shares nothing with ours but the encoders' architecture and the views: cross entropies over explicit logits, a queue
with D x K columns, moving averages parameter by parameter, SGD by hand, ranks and micro-batches as loops.
"""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dataset_tools.sources import open_source
from leoclr_fast.config import RunConfig
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.methods import METHODS, build_method
from leoclr_fast.run.checkpoint import load_checkpoint
from leoclr_fast.run.folder import RunFolder
from pipelines.augment import augmented_views
from pipelines.counter_rng import KEY_SHUFFLE_STREAM, permutation
from pipelines.factory import make_loader
from pipelines.order import TrainOrder

NUM_STEPS = 6
RELATIVE = 1e-10


class PlainReference:
    """Algorithm 1, as one would write it from the paper; with one key view it is MoCo-v2."""

    def __init__(self, config: RunConfig, num_ranks: int = 1) -> None:
        """num_ranks: each has its own batch-norm, over its share of a micro-batch: the first ones one image more."""
        start = build_method(config.result).double()
        self.config = config
        self.num_ranks = num_ranks
        self.f_q = Encoder(config.result.backbone, config.result.method.projection_dim).double()
        self.f_q.load_state_dict(start.query_encoder.state_dict())
        self.f_k = deepcopy(self.f_q)
        self.queue = start.queue.keys.T.clone()  # [D, K], as moco's
        self.pointer = 0
        self.velocity: dict[str, Tensor] = {}

    def keys(self, images: Tensor, sizes: list[int], step: int, number: int) -> Tensor:
        """The momentum encoder in training mode, in passes of these sizes, over shuffled groups where the mode says so.

        images: of the whole batch, of one crop or of all of them.
        """
        method = self.config.result.method
        order = torch.arange(len(images))
        if method.key_batchnorm != "plain":
            order = torch.from_numpy(
                permutation(self.config.result.seed, step, len(images), KEY_SHUFFLE_STREAM + number)
            )
        groups = []
        for part in (rank for whole in images[order].split(sizes) for rank in whole.tensor_split(self.num_ranks)):
            least = len(part) if method.key_batchnorm == "plain" else method.key_batchnorm_group
            groups += part.tensor_split(max(1, len(part) // least))
        shuffled = torch.cat([self.f_k(group) for group in groups])
        return shuffled[torch.argsort(order)]

    def all_keys(self, crops: list[Tensor], sizes: list[int], step: int) -> list[Tensor]:
        """Of each crop of the batch. sizes: of the micro-batches."""
        if self.config.result.method.key_passes == "joint":
            return list(self.keys(torch.cat(crops), [len(crops) * size for size in sizes], step, 0).chunk(len(crops)))
        return [self.keys(crop, sizes, step, number) for number, crop in enumerate(crops)]

    def query_groups(self, images: Tensor) -> tuple[Tensor, ...]:
        """What a batch-norm of the query encoder sees of a rank's share of a micro-batch."""
        method = self.config.result.method
        return images.tensor_split(
            max(1, len(images) // method.query_batchnorm_group) if method.query_batchnorm == "split" else 1
        )

    def loss(self, q: Tensor, k: list[Tensor]) -> Tensor:
        """Eq. 2 over a micro-batch."""
        method = self.config.result.method
        losses = []
        for k_i in k:
            l_pos = torch.einsum("nc,nc->n", [q, k_i]).unsqueeze(-1)
            l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone()])
            logits = torch.cat([l_pos, l_neg], dim=1) / method.temperature
            losses.append(nn.CrossEntropyLoss()(logits, torch.zeros(len(q), dtype=torch.long)))
        loss = sum(losses, torch.zeros((), dtype=torch.float64))
        return loss / len(losses) if method.loss_reduction == "mean" else loss

    def step(self, views: tuple[Tensor, ...], step: int, lr: float) -> float:
        """views: query view, then key views. Returns the loss."""
        method, num_parts = self.config.result.method, self.config.result.micro_batches
        parts = list(zip(*(view.tensor_split(num_parts) for view in views), strict=True))
        with torch.no_grad():
            for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
                p_k.copy_(p_k * method.key_momentum + p_q * (1 - method.key_momentum))
            whole = self.all_keys(list(views[1:]), [len(part[0]) for part in parts], step)
        k = list(zip(*(key.tensor_split(num_parts) for key in whole), strict=True))
        self.f_q.zero_grad()
        total = 0.0
        for (x, *_), k_part in zip(parts, k, strict=True):
            groups = [part for rank in x.tensor_split(self.num_ranks) for part in self.query_groups(rank)]
            q = torch.cat([self.f_q(group) for group in groups])
            loss = self.loss(q, list(k_part)) * len(x) / len(views[0])
            loss.backward()
            total += loss.item()
        optimizer = self.config.result.optimizer
        with torch.no_grad():
            for name, weight in self.f_q.named_parameters():
                assert weight.grad is not None
                direction = weight.grad + optimizer.weight_decay * weight
                if name in self.velocity:
                    direction = optimizer.momentum * self.velocity[name] + direction
                self.velocity[name] = direction.clone()
                weight -= lr * direction
            for k_i in whole if method.enqueue == "all" else whole[:1]:
                for key in k_i:  # one by one around the ring
                    self.queue[:, self.pointer] = key
                    self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return total


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
        if reference.num_ranks == 1 and config.result.method.query_batchnorm == "plain":  # else theirs is a mean
            for name, statistic in reference.f_q.named_buffers():
                assert_close(ours[f"query_encoder.{name}"].double(), statistic.double(), name)
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
