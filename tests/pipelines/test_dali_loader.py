"""What is particular to DALI; see test_loader.py for what every loader has to do."""

from __future__ import annotations

import builtins
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.dali_loader import DaliLoader, _decoder_hints
from pipelines.encoded_batches import EncodedBatches
from pipelines.loader import Loader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.optional_packages import HAS_DALI, needs_dali
from tests.pipelines.oracle import assert_like_the_oracle, cpu_loader
from tests.pipelines.pictures import encode, picture, write_images

CPU = torch.device("cpu")
L = TypeVar("L", bound=Loader)

Open = Callable[..., DaliLoader]


@pytest.fixture
def open_dali() -> Iterator[Open]:
    """Opens DALI's loaders and closes them when the test ends."""
    with ExitStack() as stack:

        def start(split: Split, order: Order | None = None, *, image_size: int = 16, **config: Any) -> DaliLoader:
            settings = LoaderConfig(**({"workers": 1} | config))
            return stack.enter_context(cpu_loader(DaliLoader, split, order, image_size=image_size, config=settings))

        yield start


@pytest.fixture
def waves() -> Image.Image:
    return Image.fromarray(picture(40, 50, "waves"))


@needs_dali
class TestLikeTheOracle:
    @pytest.mark.parametrize("workers", [0, 1, 3])
    @pytest.mark.parametrize("prefetch", [1, 2, 5])
    def test_any_number_of_workers_and_of_batches_ahead(
        self, workers: int, prefetch: int, split: Split, open_dali: Open
    ) -> None:
        """Five steps in an epoch: fewer than what may be decoded and read ahead at 5."""
        loader = open_dali(split, workers=workers, prefetch_batches=prefetch)
        assert_like_the_oracle(loader, epochs=2)

    @pytest.mark.real_data
    @pytest.mark.parametrize("kind", ["folder", "tar", "ffcv", "webdataset"])
    def test_on_photographs(self, kind: str, real_data: Path, tmp_path: Path, open_dali: Open) -> None:
        photographs = open_source(real_data / "imagenet-sample-400.tar").splits["train"]
        chosen = photographs.subset(np.arange(0, 400, 25))
        if kind == "tar":
            split = chosen
        else:
            folder = tmp_path / "photographs" / "class"
            folder.mkdir(parents=True)
            for index in range(len(chosen)):
                (folder / f"{index:03}.jpg").write_bytes(chosen.read(index))
            if kind != "folder":
                convert(folder.parent, tmp_path / kind, ConvertOptions(format=kind), workers=1)  # type: ignore[arg-type]
            split = open_source(folder.parent if kind == "folder" else tmp_path / kind).splits["train"]
        order = SequentialOrder(num_images=len(split), batch_size=5)
        loader = open_dali(split, order, image_size=224, workers=2)
        assert_like_the_oracle(loader)
        assert loader.unreadable == {}

    def test_a_mix_of_jpegs_and_pngs_that_was_converted(self, tmp_path: Path, open_dali: Open) -> None:
        images = {
            f"{number}.{kind}": encode(Image.fromarray(picture(30 + number, 40 - number, "waves", number)), format)
            for number, (kind, format) in enumerate([("jpg", "JPEG"), ("png", "PNG")] * 4)
        }
        write_images(tmp_path / "mix", images)
        for format in ("ffcv", "webdataset"):
            convert(tmp_path / "mix", tmp_path / format, ConvertOptions(format=format), workers=1)  # type: ignore[arg-type]
            assert_like_the_oracle(open_dali(open_source(tmp_path / format).splits["train"]))

    def test_a_large_crop_of_a_small_batch(self, tmp_path: Path, open_dali: Open) -> None:
        """A megapixel image shrinks to 48 pixels, in a batch of its own."""
        images = {"a.jpg": encode(Image.fromarray(picture(1200, 900, "waves")), "JPEG")}
        loader = open_dali(
            write_images(tmp_path / "one", images), SequentialOrder(num_images=1, batch_size=1), image_size=48
        )
        assert_like_the_oracle(loader, epochs=2)


@needs_dali
class TestOneDecode:
    def test_of_each_image_in_an_epoch(
        self, write_split: Callable[..., Split], open_dali: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The graph has one decoder, and each image is fed to it once: an epoch of N images is N decodes."""
        split = write_split(24)
        loader = open_dali(split, SequentialOrder(num_images=24, batch_size=5))
        names = {split.read(index): index for index in range(24)}
        assert len(names) == 24
        fed: Counter[int] = Counter()
        feed = "nvidia.dali.Pipeline.feed_input"
        original = __import__("nvidia.dali", fromlist=["Pipeline"]).Pipeline.feed_input

        def count(pipeline: Any, name: str, data: Any) -> None:
            if name == "encoded":
                fed.update(names[image.tobytes()] for image in data if image.tobytes() in names)
            original(pipeline, name, data)

        monkeypatch.setattr(feed, count)
        for epoch in range(3):
            fed.clear()
            assert len(list(loader.batches(epoch))) == 5
            assert fed == Counter(range(24))
        graph = loader._pipeline.serialize()  # names of operators, not of their instances, which begin with __
        assert re.findall(rb"decoders__\w+", graph) == [b"decoders__Image"]
        assert re.findall(rb"(?<!_)Resize", graph) == []  # on a GPU one for each view: see tests/gpu


@needs_dali
class TestOddImages:
    def test_what_dali_may_see_differently_is_decoded_by_pillow(
        self, tmp_path: Path, waves: Image.Image, open_dali: Open
    ) -> None:
        """GIF, WebP, a 16-bit PNG (DALI and Pillow disagree), a JPEG with something behind its end."""
        jpeg = encode(waves, "JPEG")
        deep = Image.fromarray(np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50)
        split = write_images(
            tmp_path / "odd",
            {
                "a.gif": encode(waves, "GIF"),
                "b.webp": encode(waves, "WEBP", lossless=True),
                "c.png": encode(deep, "PNG"),
                "d.jpg": jpeg + b"more",
                "e.jpg": jpeg,
            },
        )
        loader = open_dali(split, SequentialOrder(num_images=len(split), batch_size=3))
        assert_like_the_oracle(loader, epochs=2)
        assert loader.unreadable == {}

    def test_no_rotation(self, tmp_path: Path, waves: Image.Image, open_dali: Open) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        split = write_images(tmp_path / "turned", {"a.jpg": encode(waves, "JPEG", exif=exif)})
        assert_like_the_oracle(open_dali(split, SequentialOrder(num_images=1, batch_size=1)))

    def test_what_dali_alone_cannot_read_is_not_lost(
        self,
        split: Split,
        open_dali: Open,
        monkeypatch: pytest.MonkeyPatch,
        package_log: pytest.LogCaptureFixture,
    ) -> None:
        """Pillow reads a GIF, DALI does not: here DALI is given one, as if it were a plain JPEG."""
        gif = np.frombuffer(encode(Image.fromarray(picture(33, 44, "waves")), "GIF"), dtype=np.uint8)
        original = EncodedBatches.prepare

        def prepare(batches: EncodedBatches, epoch: int, step: int) -> Any:
            batch = original(batches, epoch, step)
            for row, index in enumerate(batch.indices.tolist()):
                if index in (5, 6) and index not in batches._for_pillow:
                    batch.images[row] = gif
            return batch

        monkeypatch.setattr(EncodedBatches, "prepare", prepare)
        loader = open_dali(split, SequentialOrder(num_images=23, batch_size=6))
        assert_like_the_oracle(loader, epochs=2)
        assert loader.unreadable == {}
        assert loader.num_for_pillow == 2
        warned = [record.getMessage() for record in package_log.records if record.levelno >= logging.WARNING]
        assert warned == [f"DALI cannot decode {split.names[index]}, Pillow does" for index in (5, 6)]

    def test_later_epochs_do_not_stumble(
        self,
        split: Split,
        damage: Callable[..., None],
        open_dali: Open,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A JPEG whose Huffman tables are damaged has a size, and gets as far as DALI: once."""
        for index in (7, 8, 20):
            path = split.root / split.names[index]  # type: ignore[attr-defined]
            data = bytearray(path.read_bytes())
            tables = data.index(b"\xff\xc4") + 4
            data[tables : tables + 20] = bytes([255]) * 20
            path.write_bytes(data)
        loader = open_dali(split, SequentialOrder(num_images=23, batch_size=6))
        started: list[int] = []
        original = loader._started_pipeline
        monkeypatch.setattr(loader, "_started_pipeline", lambda: started.append(1) or original())
        assert_like_the_oracle(loader, epochs=3)
        assert sorted(loader.unreadable) == [7, 8, 20]
        assert len(started) == 3  # once, and again for each of two batches

    def test_a_folder_that_is_deleted_while_training(
        self, write_split: Callable[..., Split], damage: Callable[..., None], open_dali: Open
    ) -> None:
        split = write_split(60)
        loader = open_dali(split, SequentialOrder(num_images=60, batch_size=6))
        batches = loader.batches(0)
        next(batches)
        damage(split, *range(60), how="missing")
        with pytest.raises(RuntimeError, match=r"11 of 60 images cannot be read"):
            for _ in batches:
                pass


@needs_dali
class TestNothingIsLeft:
    def test_closing(self, split: Split, open_dali: Open) -> None:
        list(open_dali(split, workers=2).batches(0))  # DALI keeps what it has loaded, and our resize its threads
        threads, names = len(os.listdir("/proc/self/task")), set(threading.enumerate())
        for how in ("unused", "one batch", "one epoch", "two epochs"):
            with cpu_loader(DaliLoader, split, config=LoaderConfig(workers=2)) as loader:
                if how == "one batch":
                    next(loader.batches(0))
                elif how != "unused":
                    for epoch in range(1 + (how == "two epochs")):
                        list(loader.batches(epoch))
            loader.close()
            assert set(threading.enumerate()) <= names, how
            patience = time.monotonic() + 10
            while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < patience:
                time.sleep(0.01)
            assert len(os.listdir("/proc/self/task")) <= threads, how

    def test_a_program_that_ends_without_closing(self, split: Split) -> None:
        """DALI aborts where its own clean-up meets a thread that still waits for it."""
        script = f"""
import torch
from dataset_tools.sources import open_source
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.dali_loader import DaliLoader
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS
split = open_source({str(split.root)!r}).splits["train"]
order = TrainOrder(num_images=23, batch_size=4, seed=0)
config = LoaderConfig(workers=1)
loader = DaliLoader(split, LEOCLR_VIEWS, ViewConfig(), config, order, seed=0, device=torch.device("cpu"))
batches = loader.batches(0)
next(batches)
raise SystemExit(3)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
        assert done.returncode == 3
        assert "Exception ignored" not in done.stderr
        assert "abort" not in done.stderr.lower()


@needs_dali
class TestErrorsComeSoon:
    """Whatever happens in a thread reaches who waits for a batch, within ten seconds."""

    @pytest.fixture(autouse=True)
    def _soon(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("bug"), SystemExit(4)])
    @pytest.mark.parametrize("place", ["prepare", "will_need"])
    def test_of_a_reader(
        self, place: str, error: BaseException, split: Split, open_dali: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise error

        loader = open_dali(split)
        list(loader.batches(0))
        with monkeypatch.context() as patch:
            patch.setattr(loader._batches, place, fail)
            with pytest.raises(type(error)):
                list(loader.batches(1))
        assert len(list(loader.batches(2))) == loader.steps_per_epoch

    def test_of_dali(self, split: Split, open_dali: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that no image is to blame for."""
        loader = open_dali(split)
        original = loader._built_pipeline

        class Failing:
            def __init__(self, pipeline: Any) -> None:
                self.pipeline, self.runs = pipeline, 0

            def __getattr__(self, name: str) -> Any:
                return getattr(self.pipeline, name)

            def share_outputs(self) -> Any:
                self.runs += 1
                if self.runs == 5:
                    raise RuntimeError("CUDA error 999")
                return self.pipeline.share_outputs()

        monkeypatch.setattr(loader, "_built_pipeline", lambda *args, **kwargs: Failing(original(*args, **kwargs)))
        message = r"DALI failed at step 2 of epoch 0, though it can decode each of the images: CUDA error 999"
        with pytest.raises(RuntimeError, match=message):
            list(loader.batches(0))

    @pytest.mark.parametrize("place", ["prepare", "decode"])
    def test_a_thread_that_hangs(
        self, place: str, split: Split, open_dali: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released = threading.Event()

        def hang(*_: Any) -> Any:
            released.wait(30)
            raise RuntimeError("released")

        loader = open_dali(split, stall_timeout_s=1.0)
        monkeypatch.setattr(*((loader._batches, "prepare", hang) if place == "prepare" else (loader, "_decoded", hang)))
        doing = "reading the images of step 0" if place == "prepare" else "decoding|reading the images"
        try:
            with pytest.raises(
                RuntimeError, match=rf"thread has not answered for \d s while ({doing}).*stall_timeout_s"
            ):
                list(loader.batches(0))
        finally:
            released.set()


class TestWhatIsNotThere:
    def test_dali(self, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        original = builtins.__import__

        def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.startswith("nvidia.dali"):
                raise ModuleNotFoundError("No module named 'nvidia.dali'")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        message = (
            r"^the loader dali needs NVIDIA DALI, which cannot be imported \(No module named 'nvidia.dali'\)\. Install "
            r"it by `pip install 'leoclr-fast\[dali\]'` .* --loader auto, resident and torchvision work$"
        )
        with pytest.raises(ImportError, match=message):
            cpu_loader(DaliLoader, split)

    @pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
    @pytest.mark.parametrize(
        ("device", "message"), [("cuda", "this machine has no CUDA device"), ("meta", "not on meta")]
    )
    def test_the_device(self, device: str, message: str, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        order = TrainOrder(num_images=23, batch_size=4, seed=0)
        with pytest.raises(ValueError, match=message):
            DaliLoader(split, LEOCLR_VIEWS, ViewConfig(), LoaderConfig(), order, seed=0, device=torch.device(device))


class TestHints:
    def test_of_a_converted_data_set(self, split: Split, tmp_path: Path) -> None:
        convert(tmp_path / "images", tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=1)
        converted = open_source(tmp_path / "ffcv").splits["train"]
        records = converted.records  # type: ignore[attr-defined]
        width, height = int(records["width"].max()), int(records["height"].max())
        pixels = records["width"].astype(int) * records["height"]
        for part in (converted, converted.subset([1, 2, 3])):
            hints = _decoder_hints(part, 4, 2)
            assert (hints["preallocate_width_hint"], hints["preallocate_height_hint"]) == (width, height)
            assert 3 * pixels.mean() <= hints["bytes_per_sample_hint"] <= 3 * pixels.max()

    def test_are_bounded(self, split: Split, tmp_path: Path) -> None:
        convert(tmp_path / "images", tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=1)
        converted = open_source(tmp_path / "ffcv").splits["train"]
        records = converted.records  # type: ignore[attr-defined]
        for side, value in (("width", 40_000), ("height", 30_000)):
            records.columns[side] = np.array([*records.columns[side][:-1], value])
        hints = _decoder_hints(converted, 256, 16)
        assert hints["preallocate_width_hint"] * hints["preallocate_height_hint"] * 16 <= 2**28
        assert hints["preallocate_width_hint"] > hints["preallocate_height_hint"] > 1000

    def test_of_a_folder_there_are_none(self, split: Split) -> None:
        assert _decoder_hints(split, 4, 2) == {}
