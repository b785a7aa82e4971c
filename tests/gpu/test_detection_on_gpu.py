"""The detector on a GPU finds what it finds on the CPU, and trains in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leoclr_fast.config import BackboneConfig
from leoclr_fast.evaluate.detection import train_detector
from leoclr_fast.evaluate.detection.config import DetectionOptions, DetectionProtocol
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.run_detection import run
from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.run.stepper import Stepper
from tests.leoclr_fast.voc_files import write_voc
from tests.leoclr_fast.weights_files import drawn_backbone, write_weights

NARROW = BackboneConfig(arch="resnet18", width_multiplier=0.125)
TINY = DetectionProtocol(
    train_sets=("VOC2007/trainval",),
    iterations=30,
    batch_size=4,
    lr_steps=(22, 27),
    warmup_iterations=2,
    train_sides=(48, 64),
    test_side=64,
    max_side=160,
    anchor_sizes=(16, 24),
    regions_per_image=8,
    precise_bn_batches=2,
)


def test_detections_are_the_cpus() -> None:
    """In float64, where nothing is near enough to a threshold to be decided by rounding."""
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            detector = FasterRCNNC4(build_backbone(NARROW), 3, anchor_sizes=(16, 24), regions_per_image=8)
        detector = detector.double().eval().to(device)
        _, found[device] = detector(images.to(device), [(64, 80), (60, 70)])
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert len(cpu["boxes"]) > 0
        for name, values in cpu.items():
            torch.testing.assert_close(cuda[name].cpu(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_and_continues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Any) -> None:
    voc = write_voc(tmp_path / "VOCdevkit", num_train=8, num_test=3)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    write_weights(weights, drawn_backbone(NARROW), NARROW)
    losses: list[float] = []
    monkeypatch.setattr(train_detector, "_SHOW_EVERY", 1)
    monkeypatch.setattr(Stepper, "show", lambda self, epoch, loss, *given: losses.append(loss))
    for max_steps in (10, None):
        options = DetectionOptions(out=out, device="cuda", precision=precision, workers=1, max_steps=max_steps)
        result = run(weights, voc, TINY, options)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert 0 <= result["AP50_11point"] <= 100
