"""A converted data set is as good as the images it was made of: the same runs, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in RunFolder(run).read_metrics("step")]


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> the same images in it."""
    made = {format: tmp_path_factory.mktemp("converted") / format for format in ("ffcv", "webdataset")}
    for format, folder in made.items():
        convert(tiny_data, folder, ConvertOptions(format=format, order="source"), workers=1)  # type: ignore[arg-type]
    return {"folder": tiny_data, **made}


@pytest.mark.parametrize("loader", ["resident", "torchvision"])
def test_pretraining_is_the_same_on_all_formats(data: dict[str, Path], tmp_path: Path, loader: str) -> None:
    config = tiny_config(result__epochs=2, speed__loader__name=loader)
    summaries = {name: pretrain(config, path, tmp_path / f"run-{name}") for name, path in data.items()}
    expected = losses(tmp_path / "run-folder")
    assert len(expected) == 6
    assert np.isfinite(expected).all()
    for name in ("ffcv", "webdataset"):
        assert losses(tmp_path / f"run-{name}") == expected
        assert summaries[name]["knn_top1"] == summaries["folder"]["knn_top1"]


def test_a_run_goes_on_with_the_converted_data(tiny_data: Path, tmp_path: Path) -> None:
    """Names and labels are the source's: it is the same data set to `--resume`."""
    convert(tiny_data, tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=1)
    config = tiny_config(result__epochs=2)
    pretrain(config, tiny_data, tmp_path / "whole")
    pretrain(config, tiny_data, tmp_path / "moved", max_steps=4)
    pretrain(config, tmp_path / "ffcv", tmp_path / "moved")
    assert losses(tmp_path / "moved") == losses(tmp_path / "whole")
