"""A run on a GPU has the losses of one on the CPU, to rounding, and no step waits for the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.method.methods import build_method
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


def test_keys_loss_and_queue_do_not_wait_for_the_host() -> None:
    config = tiny_config().result
    method = build_method(config).cuda()
    views = [torch.randn(12, 3, 16, 16, device="cuda") for _ in range(3)]
    schedule = method.plan(BatchLayout(batch_size=12))

    def step(number: int) -> torch.Tensor:
        method.update_key_encoder()
        restore = torch.from_numpy(schedule.draw(0, number).restore).pin_memory().to("cuda", non_blocking=True)
        keys = method.encode_keys(views[1:], restore, schedule.largest)
        loss = method.loss(method.query_encoder(views[0]), keys)
        loss.backward()
        method.enqueue(keys)
        return loss.detach()

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(number) for number in range(1, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)
