"""DALI's decoders on a GPU: the order and boxes of every loader, crops near the oracle's, and nothing left behind.

Written without a GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable
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
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.optional_packages import needs_dali
from tests.pipelines.pictures import picture
from tests.tolerances import DALI_GPU_CROPS

pytestmark = [
    pytest.mark.gpu,
    needs_dali,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

SIZE = 112


def open_loader(name: str, split: Split, order: Order, device: str, **config: float) -> Loader:
    settings = LoaderConfig(name=name, workers=2, **config)  # type: ignore[arg-type]
    views = ViewConfig(image_size=SIZE)
    return make_loader(split, LEOCLR_VIEWS, views, settings, order, seed=0, device=torch.device(device))


def assert_like_the_oracle(split: Split, order: Order, epochs: int = 1, **config: float) -> Loader:
    with (
        open_loader("dali", split, order, "cuda", **config) as loader,
        open_loader("torchvision", split, order, "cpu") as oracle,
    ):
        for epoch in range(epochs):
            for batch, expected in zip(loader.batches(epoch), oracle.batches(epoch), strict=True):
                assert batch.crops.is_cuda
                assert np.array_equal(batch.indices, expected.indices)
                assert np.array_equal(batch.boxes, expected.boxes)
                assert torch.equal(batch.labels, expected.labels)
                difference = (batch.crops.cpu().int() - expected.crops.int()).abs().float()
                assert difference.mean() <= DALI_GPU_CROPS.mean
                assert difference.max() <= DALI_GPU_CROPS.max
        assert sorted(loader.unreadable) == sorted(oracle.unreadable)
    return loader


@pytest.fixture
def split(tmp_path: Path) -> Split:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        image = Image.fromarray(picture(200 + 7 * index, 300 - 5 * index, "waves", index))
        image.save(folder / f"{index:03}.{'png' if index % 9 == 4 else 'jpg'}")
    Image.fromarray(picture(200, 210, "waves")).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(picture(200, 210, "waves")).convert("L").save(folder / "gray.jpg")
    Image.fromarray(picture(200, 210, "waves")).save(folder / "progressive.jpg", progressive=True)
    return open_source(folder).splits["train"]


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_like_the_oracle(hw_decoder_load: float, split: Split) -> None:
    order = TrainOrder(num_images=len(split), batch_size=6, seed=0)
    assert_like_the_oracle(split, order, epochs=2, hw_decoder_load=hw_decoder_load)


@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
def test_a_converted_data_set_with_its_hints(format: str, split: Split, tmp_path: Path) -> None:
    convert(tmp_path / "images", tmp_path / format, ConvertOptions(format=format), workers=1)  # type: ignore[arg-type]
    converted = open_source(tmp_path / format).splits["train"]
    assert_like_the_oracle(converted, SequentialOrder(num_images=len(converted), batch_size=10))


@pytest.mark.real_data
def test_on_photographs(real_data: Path) -> None:
    photographs = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
    assert_like_the_oracle(photographs, SequentialOrder(num_images=len(photographs), batch_size=64))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"no image", lambda _: b""])
def test_unreadable_images_are_replaced(damage: Callable[[bytes], bytes], split: Split) -> None:
    for index in (3, 11, 12):
        path = split.root / split.names[index]  # type: ignore[attr-defined]
        path.write_bytes(damage(path.read_bytes()))
    loader = assert_like_the_oracle(split, SequentialOrder(num_images=len(split), batch_size=8), epochs=2)
    assert sorted(loader.unreadable) == [3, 11, 12]


def test_a_batch_stays_as_it_is_while_the_next_ones_are_made(split: Split) -> None:
    """DALI's memory must not be used again while a kernel of torch's may still read it."""
    order = TrainOrder(num_images=len(split), batch_size=6, seed=0)
    with open_loader("dali", split, order, "cuda", prefetch_batches=3) as loader:
        sums = [batch.crops.long().sum() for batch in loader.batches(0)]
        kept = [batch.crops for batch in loader.batches(0)]
        assert [int(value) for value in sums] == [int(crops.long().sum()) for crops in kept]


def test_epochs_that_were_left_early_take_no_memory(split: Split) -> None:
    order = TrainOrder(num_images=len(split), batch_size=6, seed=0)
    free = []
    with open_loader("dali", split, order, "cuda") as loader:
        for epoch in range(30):
            list(islice(loader.batches(epoch), epoch % 5))
            if epoch in (9, 29):
                list(loader.batches(100))
                torch.cuda.synchronize()
                free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[1] < 32 * 2**20
