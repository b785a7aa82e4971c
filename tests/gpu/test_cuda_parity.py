"""A run on a GPU has the losses of one on the CPU, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config, write_tiny_images


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("method", ["leoclr", "mocov2"])
def test_a_run_follows_the_cpus(method: str, tmp_path: Path) -> None:
    """Ten steps through a wrap of the queue: float64 closely, float32 within its rounding."""
    data = write_tiny_images(tmp_path / "data")
    losses = {}
    for device, precision in (("cpu", "fp64"), ("cuda", "fp64"), ("cuda", "fp32")):
        config = tiny_config(method, speed__device=device, speed__precision=precision)
        pretrain(config, data, tmp_path / f"{device}-{precision}", max_steps=10)
        records = RunFolder(tmp_path / f"{device}-{precision}").read_metrics("step")
        losses[device, precision] = [record["loss"] for record in records]
    assert not torch.backends.cudnn.allow_tf32, "its rounding is larger than what is looked for here"
    assert losses["cuda", "fp64"] == pytest.approx(losses["cpu", "fp64"], rel=1e-6)
    assert losses["cuda", "fp32"][:3] == pytest.approx(losses["cpu", "fp64"][:3], rel=1e-3)
