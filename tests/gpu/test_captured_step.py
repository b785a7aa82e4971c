"""The step captured as a CUDA graph against the eager one. Written without a GPU at hand: it has not run yet."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from leoclr_fast.config import RunConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.run.telemetry import StepMetrics
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.training.test_training_step import crop_batches, first_images
from tests.tolerances import CAPTURED_FIRST_LOSSES, CAPTURED_LOSS, COMPILED_ON_GPU_LOSS

# What differs is the capture, not the choice of an algorithm.
pytestmark = pytest.mark.usefixtures("exact_convolutions")

NUM_STEPS = 50  # of 12 images: a queue of 40 wraps around fifteen times
LOSS = 0


def cuda_config(precision: str, *, graph: str, compiled: str = "off", method: str = "leoclr") -> RunConfig:
    return tiny_config(
        method,
        speed__device="cuda",
        speed__precision=precision,
        speed__cuda_graph=graph,
        speed__compile=compiled,
        result__optimizer__base_lr=0.1,
        result__method__key_batchnorm="split",
    )


def made(config: RunConfig) -> tuple[TrainingStep, TrainingState]:
    device = torch.device("cuda", torch.cuda.current_device())
    training = TrainingState.fresh(config, Ranks(), device)
    step = TrainingStep(training, config, device)
    torch.backends.cudnn.benchmark = False  # the step has switched it on
    return step, training


def batches_on_gpu(config: RunConfig, count: int = NUM_STEPS) -> list[CropBatch]:
    return crop_batches(config, count, torch.device("cuda", torch.cuda.current_device()))


def rate(number: int) -> float:
    return 0.005 * 0.97**number


def train(step: TrainingStep, batches: list[CropBatch]) -> Tensor:
    """Metrics [steps, 4], on the host."""
    return torch.stack([step(batch, rate(number)) for number, batch in enumerate(batches)]).cpu()


@pytest.mark.parametrize("method", ["leoclr", "mocov2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fifty_captured_steps_are_fifty_eager_ones(method: str, precision: str) -> None:
    """With a rate that changes in every step, and through the end of the queue again and again."""
    losses, states = {}, {}
    for graph in ("off", "on"):
        config = cuda_config(precision, graph=graph, method=method)
        step, training = made(config)
        losses[graph] = train(step, batches_on_gpu(config))[:, LOSS]
        states[graph] = training
    difference = (losses["on"] / losses["off"] - 1).abs()
    assert difference[:5].max() <= CAPTURED_FIRST_LOSSES[precision]
    assert difference.max() <= CAPTURED_LOSS[precision]
    eager, captured = states["off"], states["on"]
    assert int(captured.method.queue.pointer) == int(eager.method.queue.pointer) == NUM_STEPS * 12 % 40
    tracked = "query_encoder.backbone.bn1.num_batches_tracked"
    assert int(captured.method.state_dict()[tracked]) == NUM_STEPS  # the warm-up is not among them
    assert losses["on"].unique().numel() > 0.9 * NUM_STEPS  # every replay met new inputs


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_host(graph: str, precision: str) -> None:
    config = cuda_config(precision, graph=graph)
    step, _ = made(config)
    batches = batches_on_gpu(config, 10)
    metrics = StepMetrics(Ranks(), 0, step.metric_names, loss_is_scaled=precision == "fp16")
    for number in range(2):  # captures, and lets every library set itself up
        metrics.add(step(batches[number], rate(number)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 10):
            metrics.add(step(batches[number], rate(number)))
        metrics.send()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (values,) = metrics.arrived(wait=True)
    assert 0 < values["loss"] < 20


def test_a_checkpoint_is_loaded_under_a_captured_step() -> None:
    config = cuda_config("fp32", graph="on")
    batches = batches_on_gpu(config, 8)
    step, training = made(config)
    first = train(step, batches[:4])
    checkpoint = deepcopy(training.state_dict(config.result))
    expected = torch.stack([step(batch, 0.003) for batch in batches[4:]]).cpu()
    training.load_state_dict(checkpoint, config.result, "here")
    again = torch.stack([step(batch, 0.003) for batch in batches[4:]]).cpu()
    torch.testing.assert_close(again[:, LOSS], expected[:, LOSS], rtol=CAPTURED_LOSS["fp32"], atol=0)
    assert len(first) == 4


def test_a_batch_of_another_size_in_between() -> None:
    losses = {}
    for graph in ("off", "on"):
        config = cuda_config("fp32", graph=graph)
        batches = batches_on_gpu(config, 6)
        batches[3] = first_images(batches[3], 7)
        losses[graph] = train(made(config)[0], batches)[:, LOSS]
    torch.testing.assert_close(losses["on"], losses["off"], rtol=CAPTURED_LOSS["fp32"], atol=0)


def test_an_overflow_in_fp16_lowers_the_scale_within_the_graph() -> None:
    config = cuda_config("fp16", graph="on")
    step, training = made(config)
    batches = batches_on_gpu(config, 3)
    step(batches[0], 0.01)
    assert training.scaler._scale is not None
    training.scaler._scale.fill_(2.0**100)
    weights = [weight.detach().clone() for weight in training.method.query_encoder.parameters()]
    row = step(batches[1], 0.01)
    assert training.scaler.get_scale() == 2.0**99
    assert not row[-1].isfinite()
    after = training.method.query_encoder.parameters()
    assert all(torch.equal(weight, before) for weight, before in zip(after, weights, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_and_captured_steps_follow_the_eager_ones(precision: str) -> None:
    losses = {}
    for compiled in ("off", "on"):
        config = cuda_config(precision, graph="on" if compiled == "on" else "off", compiled=compiled)
        losses[compiled] = train(made(config)[0], batches_on_gpu(config, 8))[:, LOSS]
    assert (losses["on"] / losses["off"] - 1).abs().max() <= COMPILED_ON_GPU_LOSS[precision]


def test_a_batch_that_does_not_fit() -> None:
    device = torch.cuda.current_device()
    config = cuda_config("fp32", graph="on")
    step, _ = made(config)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**30) / total)
    side, size = config.result.views.image_size, 1 << 17
    crops = torch.zeros(size, 3, side, side, 3, dtype=torch.uint8, device="cuda")
    (batch,) = batches_on_gpu(config, 1)
    large = CropBatch(
        crops=crops, labels=batch.labels, indices=np.arange(size), boxes=batch.boxes, epoch=0, step=0
    )  # fmt: skip
    try:
        with pytest.raises(torch.OutOfMemoryError, match=f"a batch of {size} images does not fit the memory of cuda"):
            step(large, 0.01)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
