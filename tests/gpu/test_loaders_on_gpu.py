"""The loaders that decode, on a GPU: the order and boxes of every loader, crops near the oracle's, nothing left behind.

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
from pipelines.config import LoaderConfig
from pipelines.crop_resize import cut_views
from pipelines.encoded_loader import EncodedLoader
from pipelines.factory import choose_loader
from pipelines.loader import Loader
from pipelines.order import Order
from tests.pipelines.optional_packages import needs_dali, needs_ffcv
from tests.pipelines.oracle import in_order, open_by_name, train_order
from tests.pipelines.pictures import encode, picture, write_images
from tests.tolerances import DALI_GPU_CROPS, NVJPEG_CROPS, Tolerance

CROPS = {"dali": DALI_GPU_CROPS, "nvjpeg": NVJPEG_CROPS, "ffcv": Tolerance(max=0)}
each = pytest.mark.parametrize(
    "name", [pytest.param("dali", marks=needs_dali), "nvjpeg", pytest.param("ffcv", marks=needs_ffcv)]
)


def on_gpu(name: str, split: Split, order: Order, **config: Any) -> Loader:
    return open_by_name(name, split, order, workers=2, image_size=112, device="cuda", **config)


def assert_like_the_oracle(name: str, split: Split, order: Order, epochs: int = 1, **config: Any) -> Loader:
    oracle = open_by_name("torchvision", split, order, workers=2, image_size=112)
    with on_gpu(name, split, order, **config) as loader, oracle:
        for epoch in range(epochs):
            for batch, expected in zip(loader.batches(epoch), oracle.batches(epoch), strict=True):
                assert batch.crops.is_cuda
                assert np.array_equal(batch.indices, expected.indices)
                assert np.array_equal(batch.boxes, expected.boxes)
                assert torch.equal(batch.labels, expected.labels)
                difference = (batch.crops.cpu().int() - expected.crops.int()).abs().float()
                assert difference.mean() <= CROPS[name].mean
                assert difference.max() <= CROPS[name].max
        assert sorted(loader.unreadable) == sorted(oracle.unreadable)
    return loader


@pytest.fixture
def images(tmp_path: Path) -> Split:
    """42 images: four PNGs, a gray and a CMYK JPEG, and 36 that a decoder of JPEGs gets."""
    waves = Image.fromarray(picture(200, 210, "waves"))
    files = {
        "cmyk.jpg": encode(waves.convert("CMYK"), "JPEG"),
        "gray.jpg": encode(waves.convert("L"), "JPEG"),
        "progressive.jpg": encode(waves, "JPEG", progressive=True),
    }
    for index in range(39):
        image, kind = Image.fromarray(picture(200 + 7 * index, 300 - 5 * index, "waves", index)), index % 9 == 4
        files[f"{index:03}.{'png' if kind else 'jpg'}"] = encode(image, "PNG" if kind else "JPEG")
    return write_images(tmp_path / "images", files)


@pytest.fixture
def split(images: Split, name: str, tmp_path: Path) -> Split:
    """The same for the loader of this name."""
    return converted(tmp_path, "ffcv") if name == "ffcv" else images


def converted(tmp_path: Path, format: str) -> Split:
    convert(tmp_path / "images", tmp_path / format, ConvertOptions(format=format, order="source"), workers=1)  # type: ignore[arg-type]
    return open_source(tmp_path / format).splits["train"]


@each
def test_like_the_oracle(name: str, split: Split) -> None:
    loader = assert_like_the_oracle(name, split, train_order(split, 6), epochs=2)
    assert isinstance(loader, EncodedLoader)
    assert not loader.for_pillow
    assert name == "ffcv" or loader.num_decodes == 2 * 42


@needs_dali
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_any_share_of_the_hardware_decoder(hw_decoder_load: float, images: Split) -> None:
    assert_like_the_oracle("dali", images, train_order(images, 6), hw_decoder_load=hw_decoder_load)


@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
@pytest.mark.parametrize("name", ["nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_a_converted_data_set(name: str, format: str, images: Split, tmp_path: Path) -> None:
    data = converted(tmp_path, format)
    assert_like_the_oracle(name, data, in_order(data, 10))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_on_photographs(name: str, real_data: Path) -> None:
    photographs = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
    assert_like_the_oracle(name, photographs, in_order(photographs, 64))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"no image", lambda _: b""])
@pytest.mark.parametrize("name", ["nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_unreadable_images_are_replaced(name: str, damage: Callable[[bytes], bytes], images: Split) -> None:
    for index in (3, 11, 12):
        path = images.root / images.names[index]  # type: ignore[attr-defined]
        path.write_bytes(damage(path.read_bytes()))
    loader = assert_like_the_oracle(name, images, in_order(images, 8), epochs=2)
    assert sorted(loader.unreadable) == [3, 11, 12]


def test_nvjpeg_gets_every_plain_jpeg(images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = nvjpeg_loader.decode_jpeg, []

    def counted(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
        sizes.append(len(jpegs))
        return decode(jpegs, device)

    with on_gpu("nvjpeg", images, in_order(images, 7)) as loader:
        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", counted)
        list(loader.batches(0))
    assert sum(sizes) == 36


@pytest.mark.parametrize("name", ["nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_images_are_not_written_over_before_they_are_cut(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is busy whenever a batch is to be cut. Images are of one size and 4:2:0, so that the hardware decodes
    them, whose writes wait for no stream."""

    def cut_late(*batch: Any, **options: Any) -> Tensor:
        torch.cuda._sleep(10**8)  # clock cycles: some 60 ms
        return cut_views(*batch, **options)

    files = {
        f"{index:02}.jpg": encode(
            Image.fromarray(picture(256, 320, "waves", index)), "JPEG", subsampling="4:2:0", quality=90
        )
        for index in range(48)
    }
    same = write_images(tmp_path / "same", files)
    with on_gpu(name, same, train_order(same, 6)) as loader:
        expected = [batch.crops.cpu() for batch in loader.batches(0)]
        monkeypatch.setattr("pipelines.encoded_loader.cut_views", cut_late)
        for _ in range(2):
            for batch, crops in zip(loader.batches(0), expected, strict=True):
                assert torch.equal(batch.crops.cpu(), crops)


def test_auto_takes_nvjpeg_without_dali(images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader.is_installed", lambda _: False)
    assert choose_loader(images, LoaderConfig(resident_limit_gib=0.0), torch.device("cuda")) == "nvjpeg"


@each
def test_a_batch_stays_as_it_is_while_the_next_ones_are_made(name: str, split: Split) -> None:
    """A decoder's memory, and pinned memory, must not be used again while something may still read it, however far the
    host is ahead."""
    with on_gpu(name, split, train_order(split, 6), prefetch_batches=3) as loader:
        expected = [batch.crops.cpu() for batch in loader.batches(0)]
        copies = []
        for batch in loader.batches(0):
            torch.cuda._sleep(20_000_000)
            copies.append(batch.crops.clone())
        kept = [batch.crops for batch in loader.batches(0)]
        for crops, copied, truth in zip(kept, copies, expected, strict=True):
            assert torch.equal(copied.cpu(), truth)
            assert torch.equal(crops.cpu(), truth)


@each
def test_epochs_that_were_left_early_take_no_memory(name: str, split: Split) -> None:
    free = []
    with on_gpu(name, split, train_order(split, 6)) as loader:
        for epoch in range(30):
            list(islice(loader.batches(epoch), epoch % 5))
            if epoch in (9, 29):
                list(loader.batches(100))
                torch.cuda.synchronize()
                free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[1] < 32 * 2**20
