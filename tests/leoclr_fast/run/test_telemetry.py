"""Metrics on their way to the host, the clock, the meter, the trackers."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.flops import training_flops_per_image
from leoclr_fast.method.momentum_contrast import MomentumContrast
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.telemetry import MAX_OVERFLOWS_IN_A_ROW, MetricsLog, NonFiniteLossError, StepMetrics
from leoclr_fast.run.trackers import open_trackers
from leoclr_fast.training import meters
from leoclr_fast.training.loop import pretrain
from leoclr_fast.training.meters import DeviceMeter
from tests.leoclr_fast.conftest import tiny_config

CPU = torch.device("cpu")

NAMES = ("loss", "positive_similarity", "negative_similarity", "gradient_norm")


def row(loss: float, norm: float = 1.0) -> Tensor:
    return torch.tensor([loss, 0.5, 0.1, norm], dtype=torch.float64)


class TestStepMetrics:
    def test_means_come_with_their_context_and_in_order(self) -> None:
        metrics = StepMetrics(Ranks(), 0, NAMES)
        for losses in ((1.0, 3.0), (5.0,)):
            for loss in losses:
                metrics.add(row(loss))
            metrics.send(step=len(losses))
        assert metrics.num_steps == 0
        values = list(metrics.arrived())
        assert [(record["step"], record["loss"]) for record in values] == [(2, 2.0), (1, 5.0)]
        assert list(metrics.arrived(wait=True)) == []

    def test_what_has_not_arrived_is_not_waited_for_unless_it_must_be(self) -> None:
        """With an event put in place of a GPU's."""
        waited = []

        class OnTheWay:
            def query(self) -> bool:
                return bool(waited)

            def synchronize(self) -> None:
                waited.append(True)

        metrics = StepMetrics(Ranks(), 0, NAMES)
        for step in (1, 2):
            metrics.add(row(float(step)))
            metrics.send(step=step)
            rows, _, context = metrics._sent[-1]
            metrics._sent[-1] = (rows, OnTheWay(), context)  # type: ignore[assignment]
        assert list(metrics.arrived()) == []
        assert [values["step"] for values in metrics.arrived(wait=True)] == [1, 2]
        assert waited == [True, True]
        assert list(metrics.arrived()) == []

    def test_a_loss_that_is_not_finite_names_its_step(self) -> None:
        metrics = StepMetrics(Ranks(), 10, NAMES, loss_is_scaled=True)
        for loss in (1.0, math.nan):
            metrics.add(row(loss))
        metrics.send()
        with pytest.raises(NonFiniteLossError, match=r"non-finite at step 12 \(loss nan\)"):
            list(metrics.arrived())

    def test_overflows_of_a_scaled_loss_are_skipped_until_there_are_too_many(self) -> None:
        metrics = StepMetrics(Ranks(), 0, NAMES, loss_is_scaled=True)
        for _ in range(MAX_OVERFLOWS_IN_A_ROW - 1):
            metrics.add(row(1.0, math.inf))
        metrics.add(row(1.0, 3.0))  # one good step, and the count begins anew
        metrics.send()
        (values,) = metrics.arrived()
        assert values["gradient_norm"] == pytest.approx(3.0)
        for _ in range(MAX_OVERFLOWS_IN_A_ROW):
            metrics.add(row(1.0, math.inf))
            metrics.send()
        with pytest.raises(NonFiniteLossError, match=f"last of them step {2 * MAX_OVERFLOWS_IN_A_ROW}, overflowed"):
            list(metrics.arrived())

    def test_without_a_scaled_loss_one_overflow_is_an_error(self) -> None:
        metrics = StepMetrics(Ranks(), 0, NAMES)
        metrics.add(row(1.0, math.inf))
        metrics.send()
        with pytest.raises(NonFiniteLossError, match="non-finite at step 1"):
            list(metrics.arrived())


def test_fp16_stops_when_no_loss_scale_helps(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient beyond fp16 at any scale: steps are skipped, weights stay, and then the run says so and ends."""
    loss = MomentumContrast.loss
    monkeypatch.setattr(MomentumContrast, "loss", lambda *arguments: loss(*arguments) * 1e30)
    config = tiny_config(
        speed__precision="fp16", result__epochs=20, monitor__knn_every_epochs=0, monitor__checkpoint_every_epochs=100
    )
    with pytest.raises(NonFiniteLossError, match=r"overflowed in fp16.*choose another --precision"):
        pretrain(config, tiny_data, tmp_path / "run")
    assert len(RunFolder(tmp_path / "run").read_metrics("step")) == MAX_OVERFLOWS_IN_A_ROW - 1


def test_what_a_run_tells_of_its_speed(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU: rates, data wait and the time left; nothing of a GPU."""
    pretrain(tiny_config(monitor__knn_every_epochs=0), tiny_data, tmp_path / "run", max_steps=4)
    records = RunFolder(tmp_path / "run").read_metrics("step")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["images_per_s"] > 0
        assert record["seconds_left"] == pytest.approx((4 - record["step"]) * 12 / record["images_per_s_now"])
        assert 0 <= record["data_wait_fraction"] <= 1
        assert not record.keys() & {"mfu", "gpu_memory_gib", "gpu_energy_j", "gpu_power_w"}
    seconds = sum(12 / record["images_per_s_now"] for record in records)
    assert records[-1]["images_per_s"] == pytest.approx(4 * 12 / seconds, rel=0.2)
    assert re.search(r"step 4/12 .* images/s  data wait \d+%  0:00:00 left", capsys.readouterr().out)


@pytest.mark.parametrize("warnings", [None, [], ["NVIDIA A100 MIG 1g.10gb is a MIG slice"]])
def test_what_makes_a_gpus_figures_worth_less_is_recorded(warnings: list[str] | None, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_environment(CPU, 1, warnings)
    recorded = json.loads(run.environment_file.read_text())
    assert recorded.get("gpu_warnings", None) == warnings
    assert ("gpu_warnings" in recorded) == (warnings is not None)


class TestDeviceMeter:
    def test_mfu_energy_and_power(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = tiny_config().result

        class Counter:
            readings = iter([1000.0, 1600.0, None, 1700.0])

            def read_j(self) -> float | None:
                return next(self.readings)

        now = iter([0.0, 2.0, 4.0, 6.0])
        monkeypatch.setattr(meters, "peak_flops_per_s", lambda *_: (1e12, "by hand"))
        monkeypatch.setattr(meters.EnergyMeter, "of", lambda _: Counter())
        monkeypatch.setattr(meters.time, "perf_counter", lambda: next(now))
        meter = DeviceMeter(result, "bf16", 2, CPU)
        readings = meter.readings(500.0)
        assert readings == {
            "mfu": pytest.approx(250 * training_flops_per_image(result) / 1e12),
            "gpu_energy_j": 600.0,
            "gpu_power_w": 300.0,
        }
        assert set(meter.readings(500.0)) == {"mfu"}  # the counter was silent: left out, not zero
        assert set(meter.readings(500.0)) == {"mfu"}  # nor is there a difference to a silence


class TestTrackers:
    def test_a_missing_package_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, package in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
            monkeypatch.setitem(sys.modules, package, None)
            config = tiny_config(**{f"monitor__{name}": True})
            with pytest.raises(ValueError, match=f"--monitor.{name} needs the package {name}.*pip install {name}"):
                open_trackers(config, tmp_path)

    def test_both_get_the_numbers_of_steps_and_knn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scalars: list[tuple[str, float, int]] = []
        logged: list[tuple[int, dict[str, float]]] = []
        ended: list[str] = []

        class SummaryWriter:
            def __init__(self, folder: str) -> None:
                assert folder == str(tmp_path / "tensorboard")

            def add_scalar(self, name: str, value: float, step: int) -> None:
                scalars.append((name, value, step))

            def close(self) -> None:
                ended.append("tensorboard")

        class Session:
            def log(self, numbers: dict[str, float], step: int) -> None:
                logged.append((step, numbers))

            def finish(self) -> None:
                ended.append("wandb")

        started: dict[str, Any] = {}
        board = types.ModuleType("torch.utils.tensorboard")
        board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        wandb = types.ModuleType("wandb")
        wandb.init = lambda **values: started.update(values) or Session()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        config = tiny_config(monitor__tensorboard=True, monitor__wandb=True)
        metrics_log = MetricsLog(tmp_path / "metrics.jsonl", True, open_trackers(config, tmp_path))
        metrics_log.write("start", step=0)
        metrics_log.write("step", step=3, loss=2.5)
        metrics_log.write("knn", step=6, top1=40)
        metrics_log.close()
        assert scalars == [("step/loss", 2.5, 3), ("knn/top1", 40.0, 6)]
        assert logged == [(3, {"step/loss": 2.5}), (6, {"knn/top1": 40.0})]
        assert ended == ["tensorboard", "wandb"]
        assert started["config"]["result"]["batch_size"] == 12

    def test_a_tracker_that_fails_does_not_harm_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = []

        class Session:
            def log(self, numbers: dict[str, float], step: int) -> None:
                calls.append(step)
                raise ConnectionError("no network")

            def finish(self) -> None:
                calls.append(-1)

        wandb = types.ModuleType("wandb")
        wandb.init = lambda **_: Session()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        metrics_log = MetricsLog(
            tmp_path / "metrics.jsonl", True, open_trackers(tiny_config(monitor__wandb=True), tmp_path)
        )
        for step in (1, 2):
            metrics_log.write("step", step=step, loss=1.0)
        metrics_log.close()
        assert calls == [1]
        assert "Weights & Biases gets no more metrics: ConnectionError: no network" in caplog.text
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
