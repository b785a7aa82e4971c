"""Evaluations on a GPU: what the CPU finds in float64, a backbone that stays as it was, and an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leoclr_fast.evaluate import linear
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions
from leoclr_fast.training.loop import pretrain
from pipelines.config import LoaderConfig
from tests.leoclr_fast.conftest import tiny_config, write_tiny_images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    data = write_tiny_images(folder / "data")
    pretrain(tiny_config(result__epochs=1, speed__device="cpu"), data, folder / "run")
    return folder / "run"


def on(device: str, precision: Any, out: Path) -> TrainingOptions:
    return TrainingOptions(device=device, precision=precision, loader=LoaderConfig(name="resident"), out=out)


def linear_result(run: Path, out: Path, device: str, precision: Any) -> dict[str, Any]:
    protocol = LinearProtocol(epochs=5, batch_size=16, lr_grid=(0.1, 3.0))
    return linear.run(run, run.parent / "data", protocol, on(device, precision, out))


def test_linear_in_float64_is_the_cpus(run: Path, tmp_path: Path) -> None:
    on_gpu, on_cpu = (linear_result(run, tmp_path / device, device, "fp64") for device in ("cuda", "cpu"))
    assert on_gpu["backbone_sha256_before"] == on_gpu["backbone_sha256_after"] == on_cpu["backbone_sha256_after"]
    assert (on_gpu["lr"], on_gpu["top1"]) == (on_cpu["lr"], on_cpu["top1"])
    assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_linear_leaves_the_backbone_alone(run: Path, tmp_path: Path, precision: str) -> None:
    found = linear_result(run, tmp_path / "out", "cuda", precision)
    assert found["backbone_sha256_before"] == found["backbone_sha256_after"]
    assert 0 <= found["top1"] <= 100
