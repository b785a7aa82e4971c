"""A tiny data set and a tiny configuration, so that whole runs take seconds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leoclr_fast.config import (
    BackboneConfig,
    MethodConfig,
    MonitorConfig,
    OptimizerConfig,
    ResultConfig,
    RunConfig,
    SpeedConfig,
)
from leoclr_fast.training.loop import pretrain
from pipelines.config import ViewConfig
from tests.leoclr_fast.forked_runs import ForkedRuns, fork_server
from tests.leoclr_fast.pages import runs_write_pages


def write_tiny_images(folder: Path, *, num_train: int = 40, num_val: int = 12) -> Path:
    """Lossless images of three classes, by integer arithmetic alone: the same bytes of pixels on every machine."""
    for split, count, offset in (("train", num_train, 0), ("val", num_val, 1000)):
        for index in range(count):
            label = index % 3
            height, width = 20 + (7 * index) % 13, 20 + (5 * index) % 11
            y, x = np.mgrid[:height, :width]
            waves = (x * (label + 1) * 13 + y * (index + offset) * 7) % 256
            pixels = np.stack([waves, (waves * 3 + index * 11) % 256, (waves + 40 * label) % 256], axis=-1)
            path = folder / split / f"class{label}" / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _without_pages() -> Iterator[None]:
    with runs_write_pages(False):
        yield


@pytest.fixture
def pages() -> Iterator[None]:
    """Runs write their report, as they do outside of tests."""
    with runs_write_pages(True):
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 train and 12 val images of three classes."""
    return write_tiny_images(tmp_path_factory.mktemp("tiny") / "data")


def tiny_config(method: str = "leoclr", **changes: Any) -> RunConfig:
    """Three steps an epoch, a queue that wraps around in the fourth step; fields are changed by dotted names."""
    config = RunConfig(
        recipe="tiny",
        result=ResultConfig(
            epochs=4,
            batch_size=12,
            backbone=BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625),
            method=MethodConfig(
                name=method,  # type: ignore[arg-type]
                projection_dim=8,
                queue_size=40,
                key_momentum=0.9,
                temperature=0.2,
                key_batchnorm="plain",
                key_batchnorm_group=4,
            ),
            optimizer=OptimizerConfig(base_lr=0.6),
            views=ViewConfig(image_size=16, center_crop_fraction=1.0),
        ),
        speed=SpeedConfig(device="cpu", precision="fp64", compile="off"),
        monitor=MonitorConfig(knn="on", knn_k=3, knn_every_epochs=2, log_every_steps=1),
    )
    for name, value in changes.items():
        config = _changed(config, name.split("__"), value)
    return config


def _changed(config: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return replace(config, **{head: _changed(getattr(config, head), rest, value) if rest else value})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run of one epoch, in float32."""
    out = tmp_path_factory.mktemp("tiny_run") / "run"
    pretrain(tiny_config(result__epochs=1, speed__precision="fp32"), tiny_data, out)
    return out


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of it, which nothing was evaluated of."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations*", ".lock")))


@pytest.fixture(scope="session")
def runs() -> Iterator[ForkedRuns]:
    """Starts runs in processes of their own."""
    with fork_server() as server:
        yield server
