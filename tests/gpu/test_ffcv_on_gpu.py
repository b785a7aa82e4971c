"""FFCV's batches on a GPU: the pixels of the CPU, whole although they are copied while the next ones are decoded.

Written without a GPU at hand.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import SequentialOrder
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.optional_packages import needs_ffcv
from tests.pipelines.pictures import picture

pytestmark = [
    pytest.mark.gpu,
    needs_ffcv,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

NUM_IMAGES = 61


@pytest.fixture
def split(tmp_path: Path) -> Split:
    (tmp_path / "images").mkdir()
    for index in range(NUM_IMAGES):
        height, width = 60 + 5 * (index % 13), 50 + 7 * (index % 11)
        Image.fromarray(picture(height, width, "waves", index)).save(tmp_path / f"images/{index:03}.jpg")
    convert(tmp_path / "images", tmp_path / "converted", ConvertOptions(format="ffcv", order="source"), workers=1)
    return open_source(tmp_path / "converted").splits["train"]


def open_loader(name: str, split: Split, device: str) -> Loader:
    order = SequentialOrder(num_images=NUM_IMAGES, batch_size=8)
    config, views = LoaderConfig(name=name, workers=2), ViewConfig(image_size=112)
    return make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=torch.device(device))


def test_the_pixels_of_the_cpu_while_the_gpu_is_busy(split: Split) -> None:
    """What a step is still to read must not change, however far the host is ahead."""
    with open_loader("ffcv", split, "cuda") as loader, open_loader("torchvision", split, "cpu") as oracle:
        for epoch in range(3):
            sums, expected = [], []
            for batch, other in zip(loader.batches(epoch), oracle.batches(epoch), strict=True):
                assert batch.crops.is_cuda
                assert np.array_equal(batch.boxes, other.boxes)
                assert torch.equal(batch.labels, other.labels)
                torch.cuda._sleep(20_000_000)
                sums.append(batch.crops.long().sum((1, 2, 3, 4)))
                expected.append(other.crops.long().sum((1, 2, 3, 4)))
            assert torch.equal(torch.cat(sums).cpu(), torch.cat(expected))
            assert all(
                torch.equal(ours.crops.cpu(), theirs.crops)
                for ours, theirs in zip(islice(loader.batches(epoch), 3), islice(oracle.batches(epoch), 3), strict=True)
            )


def test_abandoned_epochs_leave_no_memory(split: Split) -> None:
    with open_loader("ffcv", split, "cuda") as loader:
        list(loader.batches(0))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for epoch in range(50):
            list(islice(loader.batches(epoch), 1 + epoch % 3))
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before
