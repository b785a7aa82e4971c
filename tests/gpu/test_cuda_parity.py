"""A GPU gives what the CPU gives: pixels exactly, photometry and losses to rounding, and no step waits for the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.method.methods import build_method
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from pipelines.augment import augment, draw_augmentation
from pipelines.config import ViewConfig
from pipelines.crop_resize import PackedImages, crop_resize
from pipelines.views import LEOCLR_VIEWS, draw_boxes
from tests.leoclr_fast.conftest import tiny_config, write_tiny_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

NUM_IMAGES = 24


def packed_noise(device: str) -> PackedImages:
    rng = np.random.default_rng(0)
    heights, widths = (rng.integers(30, 300, NUM_IMAGES) for _ in range(2))
    sizes = 3 * heights * widths
    pixels = torch.from_numpy(rng.integers(0, 256, int(sizes.sum()), dtype=np.uint8))
    offsets = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    return PackedImages(pixels=pixels.to(device), offsets=offsets, heights=heights, widths=widths)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_crops_are_the_same_pixels(size: int) -> None:
    indices = np.arange(NUM_IMAGES)
    crops = {}
    for device in ("cpu", "cuda"):
        images = packed_noise(device)
        config = ViewConfig(image_size=size)
        boxes = draw_boxes(LEOCLR_VIEWS, config, images.heights, images.widths, 0, 0, indices)
        crops[device] = crop_resize(images, np.repeat(indices, 3), boxes.reshape(-1, 8), size).cpu()
    difference = (crops["cpu"].int() - crops["cuda"].int()).abs()
    assert difference.max() <= 1  # sums over more than 60 source pixels are not exact in float32
    assert difference.float().mean() < 1e-3


def test_augmentation_to_rounding() -> None:
    config = ViewConfig(image_size=64)
    crops = torch.randint(0, 256, (3 * NUM_IMAGES, 64, 64, 3), dtype=torch.uint8)
    parameters = draw_augmentation(LEOCLR_VIEWS, config, 0, 0, np.arange(NUM_IMAGES))
    truth = augment(crops, parameters, config, dtype=torch.float64)
    ours = augment(crops.cuda(), parameters.to(torch.device("cuda")), config)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=0, atol=5e-5)


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
