"""What `test_many_ranks` runs on three gloo ranks, and then on two: `-m tests.leoclr_fast.rank_program DATA OUT`.

All cases in one start, since starting takes longer than most of them. Each rank writes what it saw to
`OUT/CASE-RANK.pt`. Rank and store come from the environment, as under torchrun; each joining of the ranks is one more
restart of torchrun's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.communication_meter import CommunicationMeter
from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.gradient_buckets import GradientBuckets
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d
from leoclr_fast.method.key_batchnorm import KeyBatchNorm2d
from leoclr_fast.method.methods import METHODS
from leoclr_fast.training.loop import pretrain
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from pipelines.order import TrainOrder, rank_slice
from tests.leoclr_fast import plain_reference
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.forked_ranks import fork_ranks
from tests.leoclr_fast.pages import leave_out

CPU = torch.device("cpu")
NUM_STEPS = 4
SYNCHRONISED = {"result__method__query_batchnorm": "sync", "result__method__key_batchnorm": "sync"}
SMALL_VIEWS = {"result__views__image_size": 8}

PRETRAINED: dict[str, dict[str, Any]] = {
    "plain": {"result__method__key_batchnorm": "plain"},
    "shuffle": {"result__method__key_batchnorm": "shuffle"},
    "shuffle-joint-micro": {
        "result__method__key_batchnorm": "shuffle",
        "result__method__key_passes": "joint",
        "result__method__enqueue": "all",
        "result__micro_batches": 2,
    },
}
"""Whole runs on three ranks, of 11 images a step."""

TRAINED: dict[str, dict[str, Any]] = {
    "sync-256": {"result__method__queue_size": 600, "result__batch_size": 256, **SYNCHRONISED, **SMALL_VIEWS},
    "sync-ema-micro": {
        "result__batch_size": 20,
        "result__micro_batches": 3,
        **SYNCHRONISED,
        "result__method__key_batchnorm": "ema",
        **SMALL_VIEWS,
    },
}
"""Some steps on one, two and three ranks, which give the same; the queue wraps around in the third."""

NORMS: dict[str, tuple[torch.dtype, torch.memory_format]] = {
    "float64": (torch.float64, torch.contiguous_format),
    "channels-last": (torch.float64, torch.channels_last),
    "float32": (torch.float32, torch.contiguous_format),
    "bfloat16": (torch.bfloat16, torch.channels_last),
}


def pretrained_config(case: str) -> RunConfig:
    return tiny_config(
        result__batch_size=11,
        monitor__checkpoint_every_steps=1,
        monitor__keep_checkpoints=100,
        monitor__knn_every_epochs=0,
        **PRETRAINED[case],
    )


def trained_config(case: str, **changes: Any) -> RunConfig:
    return tiny_config(**{**TRAINED[case], "result__optimizer__base_lr": 0.03, **changes})


def noise_batches(config: RunConfig, ranks: Ranks, num_steps: int) -> list[CropBatch]:
    """This rank's batches of images that are noise, each another one, in the order of a training run."""
    size, side = config.result.batch_size, config.result.views.image_size
    num_views = len(METHODS[config.result.method.name].views)
    order = TrainOrder(
        num_images=3 * size + 1, batch_size=size, micro_batches=config.result.micro_batches, seed=config.result.seed,
        rank=ranks.rank, world_size=ranks.world_size,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (order.num_images, num_views, side, side, 3), dtype=torch.uint8, generator=generator)
    batches = []
    for number in range(num_steps):
        epoch, step = divmod(number, order.steps_per_epoch)
        indices = order.indices(epoch, step)
        batches.append(
            CropBatch(
                crops=images[torch.from_numpy(indices.copy())],
                labels=torch.full((len(indices),), -1),
                indices=indices,
                boxes=np.zeros((len(indices), num_views, 4), dtype=np.int32),
                epoch=epoch,
                step=step,
            )
        )
    return batches


def trained(
    config: RunConfig, ranks: Ranks, num_steps: int = NUM_STEPS, *, static: bool | None = None
) -> dict[str, Any]:
    """Indices of this rank's images, and losses over all ranks, in each step; the state after them."""
    training = TrainingState.fresh(config, ranks, CPU)
    step = TrainingStep(training, config, CPU, static=static)
    batches = noise_batches(config, ranks, num_steps)
    metrics = torch.stack([step(batch, config.result.lr) for batch in batches])
    ranks.all_reduce_sum([metrics])
    return {
        "indices": [batch.indices.tolist() for batch in batches],
        "losses": metrics[:, 0],
        "norms": metrics[:, -1],
        "state": training.method.state_dict(),
    }


def resumed(ranks: Ranks) -> list[Any]:
    """Every value of the state after four steps in float32, in one go, and continued from the state after two; each
    weight's gradient is a bucket of its own, and so sent as soon as it is there."""
    config = tiny_config(speed__precision="fp32", result__method__key_batchnorm="shuffle", **SMALL_VIEWS)
    batches = noise_batches(config, ranks, 4)
    with mock.patch("leoclr_fast.training.step.GradientBuckets", partial(GradientBuckets, bucket_bytes=1)):
        whole, first, second = (TrainingState.fresh(config, ranks, CPU) for _ in range(3))
        for state, part in ((whole, batches), (first, batches[:2]), (second, batches[2:])):
            if state is second:
                second.load_state_dict(deepcopy(first.state_dict(config.result)), config.result, "the first")
            step = TrainingStep(state, config, CPU)
            for batch in part:
                step(batch, config.result.lr)
    return [whole.tensors(), second.tensors()]


def exchange(key_passes: str, ranks: Ranks) -> dict[str, Any]:
    """What comes to this rank in a step of two micro-batches: the crops whose keys it encodes, their parameters."""
    config = tiny_config(
        result__batch_size=11, result__micro_batches=2, result__method__key_batchnorm="shuffle",
        result__method__key_passes=key_passes, result__views__image_size=4,
    )  # fmt: skip
    training = TrainingState.fresh(config, ranks, CPU)
    training.step = 8
    step = TrainingStep(training, config, CPU)
    (batch,) = noise_batches(config, ranks, 1)
    inputs = step._inputs(batch, step._common)
    return {
        "indices": batch.indices.tolist(), "queries": inputs[0], "keys": inputs[1], "table": inputs[2],
        "sizes": step._common.pass_sizes,
    }  # fmt: skip


def batch_norms(dtype: torch.dtype, memory_format: torch.memory_format, ranks: Ranks) -> dict[str, Any]:
    """Outputs, gradients and running statistics of both synchronised batch-norms, for a share of ten images."""
    source, images, weights = batch_norm_example(dtype)
    own = rank_slice(len(images), ranks.rank, ranks.world_size)
    norm, key_norm = SyncBatchNorm2d(source, ranks), KeyBatchNorm2d(source, "sync", 1, ranks)
    part = images[own].to(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = norm(part)
    (output * weights[own]).sum().backward()
    assert part.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    gradients = [norm.weight.grad, norm.bias.grad]
    ranks.all_reduce_sum(gradients)
    formats = [tensor.is_contiguous(memory_format=memory_format) for tensor in (output, part.grad)]
    return {
        "output": output.detach(), "gradient": part.grad, "weight": gradients[0], "bias": gradients[1],
        "statistics": [norm.running_mean, norm.running_var, norm.num_batches_tracked],
        "key_output": key_norm(images[own]).detach(), "key_statistics": [key_norm.running_mean, key_norm.running_var],
        "eval_output": norm.eval()(images[own]).detach(), "formats": formats,
    }  # fmt: skip


def batch_norm_example(dtype: torch.dtype) -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
    """A batch-norm with weights of its own, ten images far from zero, and the weights of a loss."""
    generator = torch.Generator().manual_seed(2)
    norm = nn.BatchNorm2d(3, momentum=0.3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for tensor in (norm.weight, norm.bias):
        torch.nn.init.normal_(tensor, generator=generator)
    images = (
        torch.randn(10, 3, 4, 5, dtype=torch.float64, generator=generator)
        * torch.tensor([1.0, 0.1, 9.0])[:, None, None]
    )
    images += torch.tensor([100.0, -3.0, 0.0])[:, None, None] + torch.arange(10)[:, None, None, None]
    weights = torch.randn(10, 3, 4, 5, dtype=torch.float64, generator=generator)
    return norm, images.to(dtype), weights.to(norm.weight.dtype)


def metered(ranks: Ranks) -> dict[str, Any]:
    """What three steps in float32 send."""
    config = tiny_config(speed__precision="fp32", result__method__key_batchnorm="shuffle", **SMALL_VIEWS)
    meter = CommunicationMeter()
    trained(config, Ranks(ranks.rank, ranks.world_size, meter.collective), 3)
    return {"bytes": dict(meter.bytes), "calls": dict(meter.calls), "seconds": meter.seconds()}


def restarted() -> None:
    """What torchrun does between two attempts: the keys in the store get another prefix."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(next(_ATTEMPTS))


@contextmanager
def joined() -> Iterator[Ranks]:
    restarted()
    with process_group("cpu") as (ranks, _):
        yield ranks


def keep(out: Path, ranks: Ranks, cases: dict[str, Callable[[Ranks], Any]]) -> None:
    for case, function in cases.items():
        torch.save(function(ranks), out / f"{case}-{ranks.rank}.pt")


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    leave_out()
    for case in PRETRAINED:
        restarted()
        pretrain(pretrained_config(case), data, out / f"run-{case}", max_steps=plain_reference.NUM_STEPS)
    with joined() as ranks:
        keep(
            out,
            ranks,
            {f"{case}-of-3": partial(trained, trained_config(case)) for case in TRAINED}
            | {f"{case}-static-of-3": partial(trained, trained_config(case), static=True) for case in TRAINED}
            | {f"exchange-{key_passes}": partial(exchange, key_passes) for key_passes in ("separate", "joint")}
            | {"resumed": resumed}
            | {f"norm-{name}": partial(batch_norms, dtype, form) for name, (dtype, form) in NORMS.items()},
        )
    if os.environ["RANK"] == "2":
        return
    os.environ["WORLD_SIZE"] = "2"
    with joined() as ranks:
        cases = {f"{case}-of-2": partial(trained, trained_config(case)) for case in TRAINED}
        keep(out, ranks, cases | {"metered": metered})


_ATTEMPTS = count()

if __name__ == "__main__":
    fork_ranks(3, partial(main, Path(sys.argv[1]), Path(sys.argv[2])))
