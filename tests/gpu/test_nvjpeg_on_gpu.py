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
from pipelines.factory import choose_loader, make_loader
from pipelines.loader import Loader
from pipelines.nvjpeg_loader import NvjpegLoader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS
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

    def counted(images: list[Tensor], **options: Any) -> list[Tensor]:
        sizes.append(len(images))
        return decode(images, **options)

    def count_from_now(_: NvjpegLoader) -> None:
        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", counted)

    assert_like_the_oracle(split, SequentialOrder(num_images=len(split), batch_size=7), change=count_from_now)
    others = [name for name in split.names if Path(name).suffix == ".png" or Path(name).stem in ("cmyk", "gray")]
    assert sum(sizes) == len(split) - len(others)
    assert len(others) == 6


def test_a_batch_is_decoded_while_the_one_before_waits_to_be_cut(split: Split) -> None:
    """The stream stands still before each batch is cut: the decoder, which has a stream of its own, must not have
    written the next images over these by then.
    """

    def cut_late(loader: NvjpegLoader) -> None:
        cut = loader._crops

        def late(*batch: Any) -> Tensor:
            assert torch.cuda.current_stream() == loader._stream
            torch.cuda._sleep(10**8)  # clock cycles: some 60 ms
            return cut(*batch)

        loader._crops = late  # type: ignore[method-assign]

    assert_like_the_oracle(split, TrainOrder(num_images=len(split), batch_size=6, seed=0), epochs=2, change=cut_late)


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
