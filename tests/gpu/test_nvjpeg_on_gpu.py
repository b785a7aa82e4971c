"""torchvision's nvJPEG decoder on a GPU: the order and boxes of every loader, crops near the oracle's, and nothing left
to Pillow that nvJPEG can do.

Written without a GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines import nvjpeg_loader
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.crop_resize import cut_views
from pipelines.factory import choose_loader, make_loader
from pipelines.loader import Loader
from pipelines.nvjpeg_loader import NvjpegLoader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.optional_packages import needs_dali
from tests.pipelines.pictures import picture
from tests.tolerances import NVJPEG_CROPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

SIZE = 112


def open_loader(name: str, split: Split, order: Order, device: str) -> Loader:
    views = ViewConfig(image_size=SIZE)
    config = LoaderConfig(name=name, workers=2)
    return make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=torch.device(device))


def assert_like_the_oracle(
    split: Split, order: Order, epochs: int = 1, change: Callable[[NvjpegLoader], object] = lambda _: None
) -> None:
    """change: is given the loader before its first batch."""
    with (
        open_loader("nvjpeg", split, order, "cuda") as loader,
        open_loader("torchvision", split, order, "cpu") as oracle,
    ):
        assert isinstance(loader, NvjpegLoader)
        change(loader)
        for epoch in range(epochs):
            for batch, expected in zip(loader.batches(epoch), oracle.batches(epoch), strict=True):
                assert batch.crops.is_cuda
                assert np.array_equal(batch.indices, expected.indices)
                assert np.array_equal(batch.boxes, expected.boxes)
                assert torch.equal(batch.labels, expected.labels)
                difference = (batch.crops.cpu().int() - expected.crops.int()).abs().float()
                assert difference.mean() <= NVJPEG_CROPS.mean
                assert difference.max() <= NVJPEG_CROPS.max
        assert loader.num_decodes == epochs * order.steps_per_epoch * order.max_local_batch_size
        assert sorted(loader.unreadable) == sorted(oracle.unreadable)
        assert loader.num_for_pillow == 0


@pytest.fixture
def split(tmp_path: Path) -> Split:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(39):
        image = Image.fromarray(picture(200 + 7 * index, 300 - 5 * index, "waves", index))
        image.save(folder / f"{index:03}.{'png' if index % 9 == 4 else 'jpg'}")
    waves = Image.fromarray(picture(200, 210, "waves"))
    waves.convert("CMYK").save(folder / "cmyk.jpg")
    waves.convert("L").save(folder / "gray.jpg")
    waves.save(folder / "progressive.jpg", progressive=True)
    return open_source(folder).splits["train"]


def test_like_the_oracle(split: Split) -> None:
    assert_like_the_oracle(split, TrainOrder(num_images=len(split), batch_size=6, seed=0), epochs=2)


def test_from_a_beton(split: Split, tmp_path: Path) -> None:
    convert(tmp_path / "images", tmp_path / "ffcv", ConvertOptions(format="ffcv", order="source"), workers=1)
    converted = open_source(tmp_path / "ffcv").splits["train"]
    assert_like_the_oracle(converted, SequentialOrder(num_images=len(converted), batch_size=7))


def test_nvjpeg_gets_every_plain_jpeg(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = nvjpeg_loader.decode_jpeg, []

    def counted(images: list[Tensor], device: torch.device) -> list[Tensor]:
        sizes.append(len(images))
        return decode(images, device)

    def count_from_now(_: NvjpegLoader) -> None:
        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", counted)

    assert_like_the_oracle(split, SequentialOrder(num_images=len(split), batch_size=7), change=count_from_now)
    others = [name for name in split.names if Path(name).suffix == ".png" or Path(name).stem in ("cmyk", "gray")]
    assert sum(sizes) == len(split) - len(others)
    assert len(others) == 6


@pytest.mark.parametrize("name", ["nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_images_are_not_written_over_before_they_are_cut(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is busy whenever a batch is to be cut. Images are of one size and 4:2:0, so that the hardware decodes
    them, whose writes wait for no stream."""

    def cut_late(*batch: Any, **options: Any) -> Tensor:
        torch.cuda._sleep(10**8)  # clock cycles: some 60 ms
        return cut_views(*batch, **options)

    (tmp_path / "same").mkdir()
    for index in range(48):
        waves = Image.fromarray(picture(256, 320, "waves", index))
        waves.save(tmp_path / "same" / f"{index:02}.jpg", subsampling="4:2:0", quality=90)
    split = open_source(tmp_path / "same").splits["train"]
    order = TrainOrder(num_images=48, batch_size=6, seed=0)
    with open_loader(name, split, order, "cuda") as loader:
        expected = [batch.crops.cpu() for batch in loader.batches(0)]
        monkeypatch.setattr("pipelines.encoded_loader.cut_views", cut_late)
        for _ in range(2):
            for batch, crops in zip(loader.batches(0), expected, strict=True):
                assert torch.equal(batch.crops.cpu(), crops)


def test_auto_takes_it_without_dali(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader.is_installed", lambda _: False)
    assert choose_loader(split, LoaderConfig(resident_limit_gib=0.0), torch.device("cuda")) == "nvjpeg"


def test_a_batch_stays_as_it_is_while_the_next_ones_are_made(split: Split) -> None:
    order = TrainOrder(num_images=len(split), batch_size=6, seed=0)
    with open_loader("nvjpeg", split, order, "cuda") as loader:
        batches = list(loader.batches(0))
        copies = [batch.crops.clone() for batch in batches]
        again = [batch.crops for batch in loader.batches(0)]
        for batch, copied, repeated in zip(batches, copies, again, strict=True):
            assert torch.equal(batch.crops, copied)
            assert torch.equal(batch.crops, repeated)


def test_epochs_that_were_left_early(split: Split) -> None:
    order = TrainOrder(num_images=len(split), batch_size=6, seed=0)
    with open_loader("nvjpeg", split, order, "cuda") as loader:
        used = []
        for epoch in range(30):
            list(islice(loader.batches(epoch), 1 + epoch % 4))
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_reserved())
        assert used[-1] == used[9]
