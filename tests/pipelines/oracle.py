"""Torchvision's loader as the truth: what every other loader hands out is held against its batches."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from dataset_tools.sources import Split
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader
from pipelines.order import Order, TrainOrder
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import LEOCLR_VIEWS

L = TypeVar("L", bound=Loader)


def cpu_loader(
    kind: type[L], split: Split, order: Order | None = None, *, image_size: int = 16, config: LoaderConfig | None = None
) -> L:
    """A loader of LeOCLR's views on the CPU, by default in a shuffled order of batches of 4."""
    order = order or TrainOrder(num_images=len(split), batch_size=4, seed=3)
    views = ViewConfig(image_size=image_size)
    return kind(split, LEOCLR_VIEWS, views, config or LoaderConfig(), order, seed=3, device=torch.device("cpu"))


def assert_like_the_oracle(loader: Loader, epochs: int = 1) -> None:
    """Everything is equal, to the last bit."""
    truth = cpu_loader(
        TorchvisionLoader,
        loader.split,
        loader.order,
        image_size=loader.view_config.image_size,
        config=LoaderConfig(workers=0),
    )
    for epoch in range(epochs):
        for batch, expected in zip(loader.batches(epoch), truth.batches(epoch), strict=True):
            assert (batch.epoch, batch.step) == (expected.epoch, expected.step)
            assert np.array_equal(batch.indices, expected.indices)
            assert np.array_equal(batch.boxes, expected.boxes)
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.crops, expected.crops)
    assert sorted(loader.unreadable) == sorted(truth.unreadable)
