"""The main job on real JPEGs: CIFAR-10 pretraining and kNN on its test split."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.test_cli import succeeded

pytestmark = pytest.mark.real_data

FLAGS = [
    *("--device=cpu", "--epochs=4", "--batch-size=64", "--max-images=1000", "--optimizer.base-lr=0.12"),
    *("--backbone.width-multiplier=0.125", "--monitor.knn-every-epochs=0", "--monitor.knn-k=20"),
]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["leoclr_cifar10", "mocov2_cifar10"])
def test_cifar10_learns(
    recipe: str,
    real_data: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small network, 1,000 images, four epochs: the loss falls once the queue is full of real keys, kNN rises."""
    data = real_data / "cifar10-jpeg.tar.xz"
    monkeypatch.setenv("LEOCLR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    arguments = ["pretrain", recipe, "--data", data, "--out", tmp_path / "run", *FLAGS, "--method.queue-size=512"]
    summary, output = succeeded(capsys, *arguments)
    assert summary["steps"] == 4 * (1000 // 64)
    assert "loader resident" in output
    assert summary["knn_top1"] > summary["knn_top1_untrained"]
    assert summary["knn_top1"] > 15  # chance is 10
    losses = [record["loss"] for record in RunFolder(tmp_path / "run").read_metrics("step")]
    assert losses[-1] < max(losses) - 0.05  # means over ten steps; the peak is where the queue has filled
    knn, _ = succeeded(capsys, "knn", tmp_path / "run", "--data", data, "--max-images", 1000, "--device", "cpu")
    assert knn["top1"] == pytest.approx(summary["knn_top1"])
    assert (knn["bank_images"], knn["query_images"]) == (1000, 1000)
