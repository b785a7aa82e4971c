"""The step by itself: static as eager, without a trace of its warm-up, and the options that change only the speed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.communication_meter import CommunicationMeter
from benchmarks.kernels import AugmentBenchConfig
from leoclr_fast.config import RunConfig, SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.detection.config import DetectionOptions
from leoclr_fast.evaluate.protocols import TrainingOptions
from leoclr_fast.losses.info_nce_eager import info_nce_eager
from leoclr_fast.machine import compiling
from leoclr_fast.machine.compiling import what_compiling_lacks
from leoclr_fast.machine.precision import settled
from leoclr_fast.method.momentum_contrast import MomentumContrast
from leoclr_fast.schedules import learning_rate
from leoclr_fast.training import acceleration
from leoclr_fast.training import step as step_module
from leoclr_fast.training.acceleration import captures_step, compiles_encoders
from leoclr_fast.training.cuda_graph import CaptureError, StaticFunction, unchanged
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.rank_program import CPU, noise_batches
from tests.tolerances import COMPILED_LOSS, SPEED_OPTION_LOSS

NUM_STEPS = 8  # of 12 images: a queue of 40 wraps around twice
PRECISIONS = ["fp64", "fp32", "bf16", "fp16"]


def crop_batches(config: RunConfig, num_batches: int = NUM_STEPS, device: torch.device = CPU) -> list[CropBatch]:
    return [replace(batch, crops=batch.crops.to(device)) for batch in noise_batches(config, Ranks(), num_batches)]


def first_images(batch: CropBatch, count: int) -> CropBatch:
    return replace(
        batch, crops=batch.crops[:count], labels=batch.labels[:count], indices=batch.indices[:count],
        boxes=batch.boxes[:count],
    )  # fmt: skip


def train(
    config: RunConfig, batches: list[CropBatch], *, static: bool = False, training: TrainingState | None = None
) -> tuple[TrainingState, Tensor]:
    """The state after the batches, at a rate that changes with every step, and the metrics [steps, 4]."""
    training = training or TrainingState.fresh(config, Ranks(), CPU)
    step = TrainingStep(training, config, CPU, static=static)
    rates = [learning_rate("cosine_per_step", config.result.lr, training.step, 2 * NUM_STEPS, 1) for _ in batches]
    rows = [step(batch, 0.9**number * lr) for number, (batch, lr) in enumerate(zip(batches, rates, strict=True))]
    return training, torch.stack(rows)


def assert_same_state(one: TrainingState, other: TrainingState) -> None:
    assert one.step == other.step
    names = [*one.method.state_dict()]
    for name, ours, theirs in zip(
        names, one.method.state_dict().values(), other.method.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def assert_static_is_eager(config: RunConfig, batches: list[CropBatch]) -> tuple[TrainingState, Tensor]:
    """Bit by bit. Returns the state and the metrics."""
    eager, expected = train(config, batches)
    static, metrics = train(config, batches, static=True)
    torch.testing.assert_close(metrics, expected, rtol=0, atol=0, equal_nan=True)  # fp16 may overflow at first
    assert_same_state(static, eager)
    return static, metrics


class TestStaticStep:
    """Through buffers that stay where they are: what a GPU captures, here without the capture."""

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("method", ["leoclr", "mocov2"])
    def test_equals_the_eager_step_bit_by_bit(self, method: str, precision: str) -> None:
        """Eight steps with a changing rate, through two wraps of the queue: weights, buffers, queue, loss scale."""
        config = tiny_config(method, speed__precision=precision, result__method__key_batchnorm="split")
        static, metrics = assert_static_is_eager(config, crop_batches(config))
        assert int(static.method.queue.pointer) == NUM_STEPS * 12 % 40
        assert metrics[:, 0].unique().numel() == NUM_STEPS

    @pytest.mark.parametrize("key_batchnorm", ["plain", "ema", "sync", "shuffle"])
    def test_in_every_mode_of_batch_norm(self, key_batchnorm: str) -> None:
        config = tiny_config(result__method__key_batchnorm=key_batchnorm, result__method__enqueue="all")
        assert_static_is_eager(config, crop_batches(config, 4))

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_in_micro_batches(self, precision: str) -> None:
        """In fp16 the loss is scaled once for all parts."""
        config = tiny_config(
            speed__precision=precision, result__micro_batches=3, result__method__key_batchnorm="split",
            result__method__key_batchnorm_group=2,
        )  # fmt: skip
        assert_static_is_eager(config, crop_batches(config, 4))

    def test_a_batch_of_another_size_runs_eagerly_in_between(self) -> None:
        config = tiny_config()
        batches = crop_batches(config, 4)
        batches[2] = first_images(batches[2], 7)
        static, _ = assert_static_is_eager(config, batches)
        assert int(static.method.queue.pointer) == (3 * 12 + 7) % 40

    def test_a_checkpoint_is_loaded_in_place_under_a_static_step(self) -> None:
        """A step that exists already goes on from what was loaded, in the same storage."""
        config = tiny_config(speed__precision="fp16")
        batches = crop_batches(config)
        uninterrupted, expected = train(config, batches)
        earlier, _ = train(config, batches[:3])
        checkpoint = deepcopy(earlier.state_dict(config.result))

        training = TrainingState.fresh(config, Ranks(), CPU)
        step = TrainingStep(training, config, CPU, static=True)
        step(batches[5], 0.3)  # the buffers are made, and the state goes elsewhere
        addresses = [tensor.data_ptr() for tensor in training.tensors()]
        training.load_state_dict(checkpoint, config.result, "here")
        assert [tensor.data_ptr() for tensor in training.tensors()] == addresses
        assert_same_state(training, earlier)
        rates = [0.9**number * learning_rate("cosine_per_step", config.result.lr, 0, 16, 1) for number in range(8)]
        rows = [step(batch, lr) for batch, lr in zip(batches[3:], rates[3:], strict=True)]
        assert torch.equal(torch.stack(rows), expected[3:])
        assert_same_state(training, uninterrupted)


class TestFailingCapture:
    """With `auto`, what cannot be compiled or captured runs without, from the same state; asked for, it is an error.

    `tests/fake_gpu` has captures that do fail.
    """

    @staticmethod
    def not_captured(*_: object) -> None:
        raise CaptureError("no") from RuntimeError("not permitted when stream is capturing")

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_auto_goes_on_eagerly(
        self, precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config(speed__precision=precision, speed__compile="auto")
        batches = crop_batches(config, 3)
        eager, expected = train(config, batches)

        def fails(*_: object) -> None:
            raise RuntimeError("no such pass")

        training = TrainingState.fresh(config, Ranks(), CPU)
        step = TrainingStep(training, config, CPU, static=True)
        step._compiled = {training.method.query_encoder: fails}
        monkeypatch.setattr(step_module, "StaticFunction", self.not_captured)
        rate = learning_rate("cosine_per_step", config.result.lr, 0, 2 * NUM_STEPS, 1)
        rows = [step(batch, 0.9**number * rate) for number, batch in enumerate(batches)]
        assert torch.equal(torch.stack(rows), expected)
        assert_same_state(training, eager)
        assert caplog.text.count("runs without torch.compile, slower, since it failed here: no such pass") == 1
        assert caplog.text.count("not captured as a CUDA graph, and slower, since that failed here: not permitted") == 1

    def test_what_is_asked_for_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda encoder, **_: encoder)
        config = tiny_config(speed__compile="on", speed__precision="fp32", speed__cuda_graph="on")
        batch = crop_batches(config, 1)[0]
        step = TrainingStep(TrainingState.fresh(config, Ranks(), CPU), config, CPU, static=False)
        step._compiled = {step.training.method.query_encoder: self.not_captured}
        with pytest.raises(CaptureError, match="no"):
            step(batch, 0.1)
        step = TrainingStep(step.training, config, CPU, static=True)
        monkeypatch.setattr(step_module, "StaticFunction", self.not_captured)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            step(batch, 0.1)

    def test_one_rank_that_cannot_is_enough(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(Ranks, "any_says", lambda *_: True)
        train(tiny_config(), crop_batches(tiny_config(), 2), static=True)
        assert caplog.text.count("since that failed here: another rank could not capture it") == 1


class TestWarmUp:
    """Before a capture the step runs a few times, and nobody may notice."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_leaves_every_tensor_as_it_was(self, precision: str) -> None:
        config = tiny_config(speed__precision=precision, result__method__key_batchnorm="ema")
        *before_it, batch = crop_batches(config, 6)
        training, _ = train(config, before_it)  # until the loss scale has settled
        before = [tensor.clone() for tensor in training.tensors()]
        addresses = [tensor.data_ptr() for tensor in training.tensors()]
        step = TrainingStep(training, config, CPU, static=True)
        runs = []

        def counted(inputs: Any) -> Tensor:
            runs.append([tensor.clone() for tensor in training.tensors()])
            return step._step(inputs, step._common)

        static = StaticFunction(counted, step._inputs(batch, step._common), training.tensors())
        assert len(runs) == 1
        assert all(torch.equal(tensor, value) for tensor, value in zip(training.tensors(), before, strict=True))
        assert [tensor.data_ptr() for tensor in training.tensors()] == addresses
        static(step._inputs(batch, step._common))
        changed = [not torch.equal(tensor, value) for tensor, value in zip(training.tensors(), before, strict=True)]
        assert sum(changed) > 0.7 * len(changed)  # so the comparison above could have failed

    def test_every_tensor_that_a_step_changes_is_among_them(self) -> None:
        """Running statistics, their counters, momentum, queue, pointer, key model, loss scale and its counter."""
        config = tiny_config(speed__precision="fp16")
        training = TrainingState.fresh(config, Ranks(), CPU)
        assert len(training.tensors()) == (
            len(training.method.state_dict()) + len(list(training.method.query_encoder.parameters())) + 2
        )
        with unchanged(training.tensors()):
            for tensor in training.tensors():
                tensor.add_(1)
        fresh = TrainingState.fresh(config, Ranks(), CPU)
        assert_same_state(training, fresh)

    def test_it_restores_after_an_error_too(self) -> None:
        weight = torch.zeros(3)
        with pytest.raises(IndexError), unchanged([weight]):
            weight.fill_(1)[3]
        assert torch.equal(weight, torch.zeros(3))


@pytest.mark.parametrize("mode", ["split", "ema"])
def test_a_copy_in_half_precision_is_what_autocast_computes(mode: str) -> None:
    """To the last bit, in every step; and none of its weights is rounded again in a pass."""
    config = tiny_config(speed__precision="bf16", result__method__key_batchnorm=mode)
    batches = crop_batches(config, 3)
    rounded, metrics = train(config, batches)
    plain = TrainingState.fresh(config, Ranks(), CPU)
    assert isinstance(rounded.method, MomentumContrast)
    assert isinstance(plain.method, MomentumContrast)
    (copied,) = rounded.method._rounded
    layers = [module for module in copied.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert {weight.dtype for layer in layers for weight in layer.parameters()} == {torch.bfloat16}
    plain.method._rounded = ()
    step = TrainingStep(plain, config, CPU)
    rate = learning_rate("cosine_per_step", config.result.lr, 0, 2 * NUM_STEPS, 1)
    rows = torch.stack([step(batch, 0.9**number * rate) for number, batch in enumerate(batches)])
    assert torch.equal(metrics, rows)
    assert torch.equal(rounded.method.queue.keys, plain.method.queue.keys)


@pytest.mark.parametrize(
    ("mode", "micro_batches", "sizes"),
    [
        ("split", 1, [24]),
        ("split", 3, [8, 8, 8]),
        ("split", 2, [6, 6, 6, 6]),
        ("ema", 2, [12, 12]),
        ("plain", 1, [12, 12]),
    ],
)
def test_key_views_go_through_the_encoder_together_where_that_is_the_same(
    mode: str, micro_batches: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of 4 images, and as on a GPU."""
    config = tiny_config(result__method__key_batchnorm=mode, result__micro_batches=micro_batches)
    batches, seen = crop_batches(config, 3), []
    expected = train(config, batches)[1]
    own_sizes = MomentumContrast.forward_sizes

    def as_on_a_gpu(method: MomentumContrast, plan: Any, _: bool) -> list[int]:
        seen.append(own_sizes(method, plan, True))
        return seen[-1]

    monkeypatch.setattr(MomentumContrast, "forward_sizes", as_on_a_gpu)
    torch.testing.assert_close(train(config, batches)[1], expected, rtol=1e-11, atol=0)
    assert seen == [sizes] * 3


class TestOptionsThatChangeOnlyTheSpeed:
    def test_memory_format_and_compiled_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loss is traced, and not made into C++, which test_info_nce has done."""
        traced = torch.compile(info_nce_eager, backend="aot_eager")
        monkeypatch.setattr("leoclr_fast.losses.info_nce._compiled", lambda: traced)
        config = tiny_config(speed__precision="fp32")
        truth = train(tiny_config(), crop_batches(config))[1][:, 0]
        for changes in ({}, {"speed__channels_last": False}, {"speed__loss_impl": "compiled"}):
            losses = train(tiny_config(speed__precision="fp32", **changes), crop_batches(config))[1][:, 0]
            assert (losses / truth - 1).abs().max() < SPEED_OPTION_LOSS, changes

    @pytest.mark.long
    @pytest.mark.timeout(900)
    @pytest.mark.skipif(what_compiling_lacks("cpu") is not None, reason="there is no C++ compiler")
    @pytest.mark.parametrize("key_batchnorm", ["split", "ema"])
    def test_compiled_encoders(self, key_batchnorm: str) -> None:
        changes = {"speed__precision": "fp32", "result__method__key_batchnorm": key_batchnorm}
        truth = train(tiny_config(**{**changes, "speed__precision": "fp64"}), crop_batches(tiny_config(), 4))[1][:, 0]
        config = tiny_config(**changes, speed__compile="on")
        batches = crop_batches(config, 4)
        for static in (False, True):
            losses = train(config, batches, static=static)[1][:, 0]
            assert (losses / truth - 1).abs().max() < COMPILED_LOSS


class TestBadInput:
    def test_compile_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(acceleration, "what_compiling_lacks", lambda _: "a C++ compiler (g++ or clang++)")
        with pytest.raises(ValueError, match=r"--compile on needs a C\+\+ compiler .* choose --compile off"):
            compiles_encoders(SpeedConfig(compile="on"), CPU)
        assert not compiles_encoders(SpeedConfig(compile="auto"), CPU)

    def test_triton_is_missing(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(acceleration, "what_compiling_lacks", what_compiling_lacks.__wrapped__)
        monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
        cuda = torch.device("cuda", 0)
        assert not compiles_encoders(SpeedConfig(), cuda)
        assert "not compiled because the package triton is missing" in caplog.text
        with pytest.raises(ValueError, match="--compile on needs the package triton"):
            compiles_encoders(SpeedConfig(compile="on"), cuda)

    def test_what_a_graph_needs(self) -> None:
        cuda = torch.device("cuda", 0)
        wanted = SpeedConfig(cuda_graph="on")
        with pytest.raises(ValueError, match="a CUDA GPU is needed and the device is cpu; choose --cuda-graph auto"):
            captures_step(wanted, CPU, Ranks())
        with pytest.raises(ValueError, match="the time of every collective is to be measured"):
            captures_step(wanted, cuda, Ranks(0, 2, CommunicationMeter().collective))
        with pytest.raises(ValueError, match="in fp64"):
            captures_step(replace(wanted, precision="fp64"), cuda, Ranks())
        assert captures_step(SpeedConfig(), cuda, Ranks())
        assert not captures_step(SpeedConfig(cuda_graph="off"), cuda, Ranks())
        assert not captures_step(SpeedConfig(), CPU, Ranks())

    def test_a_graph_of_several_ranks_must_be_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        cuda = torch.device("cuda", 0)
        assert not captures_step(SpeedConfig(), cuda, Ranks(0, 2))
        assert not caplog.text
        assert captures_step(SpeedConfig(cuda_graph="on"), cuda, Ranks(0, 2))
        assert "a graph of 2 ranks has never been tried" in caplog.text

    def test_precision_of_a_gpu_that_is_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
        with pytest.raises(ValueError, match=r"bf16 needs .* 8\.0 or more, and Tesla V100 has 7\.0; choose fp16"):
            settled(SpeedConfig(precision="bf16"), cuda)
        for given, device, expected in (("auto", cuda, "fp16"), ("fp16", cuda, "fp16"), ("bf16", CPU, "bf16")):
            assert settled(SpeedConfig(precision=given), device).precision == expected
        assert settled(TrainingOptions(), CPU).precision == settled(DetectionOptions(), CPU).precision == "fp32"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert settled(AugmentBenchConfig(), cuda).precision == "bf16"
