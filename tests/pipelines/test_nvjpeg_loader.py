"""What is particular to the nvJPEG loader, with torchvision's CPU decoder in place of the GPU's; see test_loader.py."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines import nvjpeg_loader
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.nvjpeg_loader import NvjpegLoader, nvjpeg_obstacle
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.oracle import assert_like_the_oracle, cpu_loader
from tests.pipelines.pictures import encode, picture, write_images

CPU = torch.device("cpu")
Open = Callable[..., NvjpegLoader]


@pytest.fixture
def open_nvjpeg(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(NvjpegLoader, "devices", ("cpu", "cuda"))
    assert nvjpeg_obstacle(CPU) is None
    with ExitStack() as stack:

        def start(split: Split, order: Order | None = None, image_size: int = 16, **config: Any) -> NvjpegLoader:
            settings = LoaderConfig(**({"workers": 2} | config))
            return stack.enter_context(cpu_loader(NvjpegLoader, split, order, image_size=image_size, config=settings))

        yield start


class TestWhatIsDecodedWhere:
    def test_only_plain_jpegs_go_to_nvjpeg(
        self, tmp_path: Path, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waves = Image.fromarray(picture(40, 50, "waves"))
        plain = {
            "baseline.jpg": encode(waves, "JPEG"),
            "progressive.jpg": encode(waves, "JPEG", progressive=True),
            "odd.jpg": encode(waves.crop((0, 0, 37, 29)), "JPEG", subsampling=0),
        }
        split = write_images(
            tmp_path / "kinds",
            plain
            | {
                "cmyk.jpg": encode(waves.convert("CMYK"), "JPEG"),
                "deep.png": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
                "gray.jpg": encode(waves.convert("L"), "JPEG"),
                "rgb.jpg": encode(waves, "JPEG", keep_rgb=True),
                "small.gif": encode(waves, "GIF"),
                "tail.jpg": encode(waves, "JPEG") + b"more",
            },
        )
        given: list[bytes] = []
        original = nvjpeg_loader.decode_jpeg

        def decode(images: list[torch.Tensor], **options: Any) -> Any:
            given.extend(image.numpy().tobytes() for image in images)
            return original(images, **options)

        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)
        loader = open_nvjpeg(split, SequentialOrder(num_images=len(split), batch_size=4))
        assert_like_the_oracle(loader)
        assert Counter(given) == Counter(plain.values())

    def test_one_decode_of_each_image(self, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        original = nvjpeg_loader.decode_jpeg
        monkeypatch.setattr(
            nvjpeg_loader, "decode_jpeg", lambda images, **how: sizes.append(len(images)) or original(images, **how)
        )
        loader = open_nvjpeg(split, SequentialOrder(num_images=23, batch_size=5))
        for epoch in range(3):
            list(loader.batches(epoch))
            assert sum(sizes) == loader.num_decodes == 23 * (epoch + 1)
        assert sizes == 3 * [5, 5, 5, 5, 3]

    @pytest.mark.real_data
    @pytest.mark.parametrize("kind", ["tar", "ffcv", "webdataset"])
    def test_on_photographs(self, kind: str, real_data: Path, tmp_path: Path, open_nvjpeg: Open) -> None:
        chosen = open_source(real_data / "imagenet-sample-400.tar").splits["train"].subset(np.arange(0, 400, 25))
        if kind != "tar":
            images = {f"{index:03}.jpg": chosen.read(index) for index in range(len(chosen))}
            write_images(tmp_path / "photographs", images)
            convert(tmp_path / "photographs", tmp_path / kind, ConvertOptions(format=kind), workers=1)  # type: ignore[arg-type]
            chosen = open_source(tmp_path / kind).splits["train"]
        order = SequentialOrder(num_images=len(chosen), batch_size=5)
        assert_like_the_oracle(open_nvjpeg(chosen, order, image_size=96))


class TestFaults:
    def test_what_nvjpeg_cannot_decode_is_decoded_by_pillow(
        self, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
    ) -> None:
        refused = {split.read(index) for index in (4, 5, 20)}
        calls: list[int] = []
        original = nvjpeg_loader.decode_jpeg

        def decode(images: list[torch.Tensor], **options: Any) -> Any:
            calls.append(len(images))
            if any(image.numpy().tobytes() in refused for image in images):
                raise RuntimeError("nvjpegDecodeBatched failed")
            return original(images, **options)

        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)
        loader = open_nvjpeg(split, SequentialOrder(num_images=23, batch_size=5))
        assert loader.num_for_pillow == 0
        assert_like_the_oracle(loader)
        assert loader.unreadable == {}
        assert loader.num_for_pillow == 3
        warned = [message for message in package_log.messages if "Pillow" in message]
        assert warned == [f"nvJPEG cannot decode {split.names[index]}, Pillow does" for index in (4, 5, 20)]
        calls.clear()
        assert_like_the_oracle(loader)
        assert sum(calls) == 20  # later epochs do not stumble again

    def test_nvjpeg_decodes_nothing(self, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        """At the start: one clear error. Later: the run ends instead of decoding on the CPU in silence."""

        def decode(_: list[torch.Tensor], **__: Any) -> Any:
            raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

        loader = open_nvjpeg(split)
        list(loader.batches(0))
        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)
        with pytest.raises(RuntimeError, match=r"nvJPEG decodes none of the 4 images of a batch, and Pillow"):
            list(loader.batches(1))
        nvjpeg_obstacle.cache_clear()
        message = "the nvjpeg loader cannot be used: torchvision cannot decode a JPEG on cpu: decode_jpegs_cuda: .*"
        with pytest.raises(RuntimeError, match=f"{message}; choose --loader torchvision"):
            open_nvjpeg(split)
        nvjpeg_obstacle.cache_clear()

    def test_an_error_that_no_image_explains(
        self, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = nvjpeg_loader.decode_jpeg

        def decode(images: list[torch.Tensor], **options: Any) -> Any:
            if len(images) > 1:
                raise RuntimeError("CUDA error: something")
            return original(images, **options)

        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)
        message = "nvJPEG failed at step 0 of epoch 0, though it can decode each of the images: CUDA error: something"
        with pytest.raises(RuntimeError, match=message):
            list(open_nvjpeg(split).batches(0))


class TestThreads:
    @pytest.mark.parametrize("place", ["prepare", "decode_jpeg", "cut_views"])
    @pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("bug"), SystemExit(4)])
    def test_errors_come_soon(
        self, place: str, error: BaseException, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        loader = open_nvjpeg(split)
        if place == "prepare":
            monkeypatch.setattr(loader._batches, "prepare", fail)
        else:
            monkeypatch.setattr(nvjpeg_loader, place, fail)
        began = time.monotonic()
        with pytest.raises(type(error)):
            list(loader.batches(0))
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("place", ["prepare", "_crops"])
    def test_a_thread_that_hangs(
        self, place: str, split: Split, open_nvjpeg: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released = threading.Event()

        def hang(*_: Any) -> Any:
            released.wait(30)
            raise RuntimeError("released")

        loader = open_nvjpeg(split, stall_timeout_s=1.0)
        monkeypatch.setattr(loader._batches if place == "prepare" else loader, place, hang)
        try:
            with pytest.raises(RuntimeError, match=r"thread has not answered for \d s while .*stall_timeout_s"):
                list(loader.batches(0))
        finally:
            released.set()


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "this machine has no CUDA device; choose"), ("cpu", "on a GPU, not on cpu; choose")],
)
def test_without_a_gpu(device: str, message: str, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    order = TrainOrder(num_images=23, batch_size=4, seed=0)
    with pytest.raises(ValueError, match=message):
        NvjpegLoader(split, LEOCLR_VIEWS, ViewConfig(), LoaderConfig(), order, seed=0, device=torch.device(device))
