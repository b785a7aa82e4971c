"""The detector on a GPU finds what it finds on the CPU, and trains in every precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from leoclr_fast.backbone import build_backbone
from leoclr_fast.config import BackboneConfig
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.test_detection import TINY, small_detector
from tests.leoclr_fast.test_export import write_weights
from tests.leoclr_fast.voc_files import write_voc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def test_detections_are_the_cpus() -> None:
    """In float64, where nothing is near enough to a threshold to be decided by rounding."""
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        detector = small_detector().double().eval().to(device)
        _, found[device] = detector(images.to(device), [(64, 80), (60, 70)])
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert len(cpu["boxes"]) > 0
        for name, values in cpu.items():
            torch.testing.assert_close(cuda[name].cpu(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_and_continues(capsys: pytest.CaptureFixture[str], tmp_path: Path, precision: str) -> None:
    voc = write_voc(tmp_path / "VOCdevkit", num_train=8, num_test=3)
    config = BackboneConfig(arch="resnet18", width_multiplier=0.125)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = write_weights(tmp_path / "weights.safetensors", build_backbone(config), config)
    flags = [flag for flag in TINY if not flag.startswith("--device")]
    line = ["detect", weights, "--data", voc, "--out", tmp_path / "out", *flags, "--device=cuda", "--iterations=30"]
    succeeded(capsys, *line, "--precision", precision, "--max-iterations=10")
    result, _ = succeeded(capsys, *line, "--precision", precision)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert 0 <= result["AP50"] <= 100
