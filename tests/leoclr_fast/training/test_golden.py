"""The loss curve of the demo recipe: equal to a committed one in float64.

`python -m tests.leoclr_fast.training.test_golden` writes the curve anew; do that only where a change of the result is
meant, and say why in the commit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import leoclr_fast.training.state
from leoclr_fast.config import RunConfig
from leoclr_fast.method.methods import build_method
from leoclr_fast.method.momentum_contrast import MomentumContrast
from leoclr_fast.recipes import get_recipe
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from pipelines.counter_rng import uniform
from tests.leoclr_fast.conftest import write_tiny_images

CURVES = Path(__file__).parent / "golden" / "demo_float64.json"
RECIPES = ("leoclr_demo", "mocov2_demo")
RELATIVE = 1e-9


def small_demo(recipe: str, precision: str) -> RunConfig:
    """The demo recipe as it is, but for fewer and smaller images, a smaller batch, and a queue that wraps around."""
    config = get_recipe(recipe)
    result = config.result
    return replace(
        config,
        result=replace(
            result,
            epochs=4,
            batch_size=12,
            backbone=replace(result.backbone, width_multiplier=0.125),
            method=replace(result.method, queue_size=40, key_batchnorm_group=4),
            views=replace(result.views, image_size=24, blur_probability=0.5),
        ),
        speed=replace(config.speed, device="cpu", precision=precision),  # type: ignore[arg-type]
        monitor=replace(config.monitor, log_every_steps=1, knn_k=3, knn_every_epochs=0),
    )


def portable_method(*arguments: object) -> MomentumContrast:
    """`build_method` with weights from our own generator: torch's normal numbers differ in the last bit by machine."""
    method = build_method(*arguments).double()  # type: ignore[arg-type]
    assert isinstance(method, MomentumContrast)
    for number, (name, tensor) in enumerate(method.state_dict().items()):
        if tensor.is_floating_point() and not name.startswith("key_encoder") and "bn" not in name:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1000
            draws = uniform(7, 0, torch.arange(tensor.numel()).numpy(), number, 1)
            tensor.copy_(torch.from_numpy(2 * draws - 1).reshape(tensor.shape) * (6 / fan_in) ** 0.5)
    method.queue.keys.div_(method.queue.keys.norm(dim=1, keepdim=True))
    method.key_encoder.load_state_dict(method.query_encoder.state_dict())
    return method


def golden_curve(recipe: str, folder: Path) -> list[float]:
    """Losses of twelve steps in float64 on one thread, from portable weights and lossless images."""
    data = folder / "data"
    if not data.exists():
        write_tiny_images(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leoclr_fast.training.state, "build_method", portable_method)
        pretrain(small_demo(recipe, "fp64"), data, folder / recipe)
    torch.set_num_threads(threads)
    return [record["loss"] for record in RunFolder(folder / recipe).read_metrics("step")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_committed_curve(recipe: str, tmp_path: Path) -> None:
    expected = json.loads(CURVES.read_text())[recipe]
    curve = golden_curve(recipe, tmp_path)
    assert len(curve) == len(expected) == 12
    assert curve == pytest.approx(expected, rel=RELATIVE)


def test_the_curve_notices_a_change(tmp_path: Path) -> None:
    """A tenth of a percent of the temperature is far outside the tolerance."""
    expected = json.loads(CURVES.read_text())["leoclr_demo"]
    config = small_demo("leoclr_demo", "fp64")
    method = replace(config.result.method, temperature=config.result.method.temperature * 1.001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leoclr_fast.training.state, "build_method", portable_method)
        config = replace(config, result=replace(config.result, method=method))
        pretrain(config, write_tiny_images(tmp_path / "data"), tmp_path / "run", max_steps=1)
    (record,) = RunFolder(tmp_path / "run").read_metrics("step")
    assert abs(record["loss"] / expected[0] - 1) > 1000 * RELATIVE


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        curves = {recipe: golden_curve(recipe, Path(folder)) for recipe in RECIPES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
