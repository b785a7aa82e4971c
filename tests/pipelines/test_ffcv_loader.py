"""What is particular to FFCV: damaged .betons, threads that die or are left; see test_loader.py for the rest."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.beton import METADATA_START
from dataset_tools.formats.records import RAW
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.converted import ConvertedSplit
from pipelines import decode, ffcv_loader
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.ffcv_loader import FfcvLoader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import LEOCLR_VIEWS
from tests.pipelines.optional_packages import needs_ffcv
from tests.pipelines.pictures import picture
from tests.pipelines.test_loader import REPLACED, SEED, VIEWS, assert_is, assert_same, plain_batch

CPU = torch.device("cpu")
OpenFfcv = Callable[..., FfcvLoader]


@pytest.fixture
def beton(split: Split, tmp_path: Path) -> ConvertedSplit:
    """The 23 images of `split`, in the same order, their JPEG bytes unchanged."""
    return converted(tmp_path / "images", tmp_path / "converted")


def converted(source: Path, target: Path) -> ConvertedSplit:
    convert(source, target, ConvertOptions(format="ffcv", order="source", max_side=0), workers=1)
    split = open_source(target).splits["train"]
    assert isinstance(split, ConvertedSplit)
    return split


@pytest.fixture
def open_ffcv() -> Iterator[OpenFfcv]:
    with ExitStack() as stack:

        def start(
            split: Split,
            order: Order | None = None,
            *,
            workers: int = 1,
            views: ViewConfig = VIEWS,
            cls: type[Any] = FfcvLoader,
            prefetch: int = 2,
        ) -> Any:
            order = order or SequentialOrder(num_images=len(split), batch_size=5)
            config = LoaderConfig(workers=workers, prefetch_batches=prefetch)
            return stack.enter_context(cls(split, LEOCLR_VIEWS, views, config, order, seed=SEED, device=CPU))

        yield start


def overwrite(split: ConvertedSplit, index: int, data: bytes, at: int = 0) -> None:
    """Damages the image behind the back of its manifest; hashes are not looked at when loading."""
    assert at + len(data) <= split.records["num_bytes"][index]
    with open(split.files[0].path, "r+b") as file:
        file.seek(int(split.records["offset"][index]) + at)
        file.write(data)


def mended(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold the images that FFCV gave up on."""
    found: list[int] = []
    mended = loader._mended

    def note(batch: Any, failed: Any, epoch: int) -> Any:
        found.extend(batch.indices[failed].tolist())
        return mended(batch, failed, epoch)

    monkeypatch.setattr(loader, "_mended", note)
    return found


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@needs_ffcv
class TestPixels:
    @pytest.mark.real_data
    def test_photographs_are_the_oracle_s(self, real_data: Path, tmp_path: Path, open_ffcv: OpenFfcv) -> None:
        everything = converted(real_data / "imagenet-sample-400.tar", tmp_path / "converted")
        split = everything.subset(np.arange(0, 400, 13))
        order = TrainOrder(num_images=len(split), batch_size=8, seed=3)
        ours = open_ffcv(split, order, workers=2, views=ViewConfig())
        oracle = open_ffcv(split, order, workers=0, views=ViewConfig(), cls=TorchvisionLoader)
        assert_same(list(ours.batches(5)), list(oracle.batches(5)))
        assert ours.unreadable == {}

    @pytest.mark.parametrize("workers", [1, 2])
    def test_one_decode_for_each_image(self, workers: int, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton, workers=workers)
        for epoch in range(3):
            assert sum(len(batch.indices) for batch in loader.batches(epoch)) == 23
            assert loader.num_decodes == 23 * (epoch + 1)

    def test_raw_pixels_are_not_decoded(self, tmp_path: Path, open_ffcv: OpenFfcv) -> None:
        for index, size in enumerate([(3, 5), (1, 1), (7, 1), (1, 9), (20, 30)]):
            (tmp_path / "in/a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(*size, seed=index)).save(tmp_path / f"in/a/{index}.png")
        split = converted(tmp_path / "in", tmp_path / "out")
        num_raw = int((split.records["encoding"] == RAW).sum())
        assert num_raw >= 4
        loader = open_ffcv(split)
        (batch,) = loader.batches(0)
        assert_is(batch, plain_batch(split, np.arange(5), 0))
        assert loader.num_decodes == 5 - num_raw

    def test_progressive_gray_and_odd_subsampling(self, tmp_path: Path, open_ffcv: OpenFfcv) -> None:
        (tmp_path / "in").mkdir()
        image = Image.fromarray(picture(61, 47, "waves"))
        image.convert("L").save(tmp_path / "in/gray.jpg")
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                name = f"in/{subsampling}{progressive}.jpg"
                image.save(tmp_path / name, subsampling=subsampling, progressive=progressive, quality=95)
        split = converted(tmp_path / "in", tmp_path / "out")
        loader = open_ffcv(split)
        for batch in loader.batches(0):
            assert_is(batch, plain_batch(split, loader.order.indices(0, batch.step), 0))
        assert loader.num_decodes == 7

    def test_subsets_of_subsets_and_repeats(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        """An image that is there twice has two boxes: its index is not the same."""
        split = beton.subset([20, 4, 11, 9, 0]).subset([3, 1, 4, 3, 3, 3, 0] * 5)
        loader = open_ffcv(split)
        batches = list(loader.batches(0))
        assert len(batches) == 7
        for batch in batches:
            assert_is(batch, plain_batch(split, loader.order.indices(0, batch.step), 0))

    def test_one_image_and_ranks_without_any(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        split = beton.subset([7])
        for rank in range(3):
            loader = open_ffcv(split, SequentialOrder(num_images=1, batch_size=8, rank=rank, world_size=3))
            (batch,) = loader.batches(0)
            assert batch.crops.shape == (1 if rank == 0 else 0, 3, 16, 16, 3)
            assert_is(batch, plain_batch(split, np.arange(1), 0) if rank == 0 else {"indices": np.empty(0)})

    def test_batches_are_nobody_else_s_memory(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton, SequentialOrder(num_images=23, batch_size=1), prefetch=1)
        kept = list(loader.batches(0))
        copies = [batch.crops.clone() for batch in kept]
        list(loader.batches(1))
        assert len({batch.crops.data_ptr() for batch in kept}) == 23
        assert all(torch.equal(batch.crops, copy) for batch, copy in zip(kept, copies, strict=True))
        for batch in kept:
            assert_is(batch, plain_batch(beton, batch.indices, 0))

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_copying_ahead_keeps_the_order(
        self, world_size: int, beton: ConvertedSplit, open_ffcv: OpenFfcv, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is done for a GPU, without one: tests/gpu has the rest."""
        monkeypatch.setattr(FfcvLoader, "_copies_ahead", True)
        order = SequentialOrder(num_images=23, batch_size=11, rank=world_size - 1, world_size=world_size)
        loader = open_ffcv(beton, order)
        for start in range(4):
            steps = []
            for batch in loader.batches(2, start):
                time.sleep(0.02)  # so that the next one is there
                assert_is(batch, plain_batch(beton, order.indices(2, batch.step), 2) if len(batch.indices) else {})
                steps.append(batch.step)
            assert steps == list(range(start, 3))


@needs_ffcv
class TestUnreadableImages:
    @pytest.mark.parametrize("case", REPLACED)
    def test_the_next_image_takes_the_place(
        self, case: str, beton: ConvertedSplit, open_ffcv: OpenFfcv, package_log: pytest.LogCaptureFixture
    ) -> None:
        bad, substitutes = REPLACED[case]
        for index in bad:
            overwrite(beton, index, b"no image")
        loader = open_ffcv(beton)
        for epoch in (0, 1):
            for batch in loader.batches(epoch):
                wanted = loader.order.indices(epoch, batch.step)
                taken = np.array([substitutes.get(index, index) for index in wanted.tolist()])
                assert_is(batch, plain_batch(beton, taken, epoch))
        assert sorted(loader.unreadable) == sorted(bad)
        warnings = [record.getMessage() for record in package_log.records if record.levelno == logging.WARNING]
        reasons = [f"cannot read {beton.names[index]} ({loader.unreadable[index]})" for index in bad]
        assert sorted(warnings) == sorted(f"{reason}; the next image takes its place" for reason in reasons)

    def test_they_are_remembered(
        self, beton: ConvertedSplit, open_ffcv: OpenFfcv, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overwrite(beton, 9, b"no image")
        loader = open_ffcv(beton)
        list(loader.batches(0))
        monkeypatch.delattr(decode, "decode_rgb")
        assert sum(len(batch.indices) for batch in loader.batches(1)) == 23

    def test_what_turbojpeg_only_warns_of_is_read_as_by_pillow(
        self, beton: ConvertedSplit, open_ffcv: OpenFfcv, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        middle = int(beton.records["num_bytes"][6]) * 2 // 3
        overwrite(beton, 6, b"\xff\x00\x12\x34" * 8, at=middle)
        loader = open_ffcv(beton)
        found = mended(loader, monkeypatch)
        for batch in loader.batches(0):
            assert_is(batch, plain_batch(beton, loader.order.indices(0, batch.step), 0))
        assert found == [6]
        assert loader.unreadable == {}

    @pytest.mark.parametrize(("height", "width"), [(5, 7), (10, 9), (200, 210)])
    def test_another_image_in_its_place(
        self,
        height: int,
        width: int,
        beton: ConvertedSplit,
        open_ffcv: OpenFfcv,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """TurboJPEG would scale it to the size that the .beton states."""
        buffer = io.BytesIO()
        Image.fromarray(picture(height, width, "waves")).convert("L").save(buffer, "JPEG", quality=1)
        index = int(np.argmax(beton.records["num_bytes"]))
        overwrite(beton, index, buffer.getvalue())
        loader = open_ffcv(beton)
        found = mended(loader, monkeypatch)
        for batch in loader.batches(0):
            assert_is(batch, plain_batch(beton, loader.order.indices(0, batch.step), 0))
        assert found == [index]
        assert loader.unreadable == {}

    def test_none_can_be_read(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        split = beton.subset(np.arange(7))
        for index in range(7):
            overwrite(beton, index, b"no image")
        with pytest.raises(ValueError, match=r"none of the 7 images can be read; .*a/000\.jpg: cannot identify"):
            list(open_ffcv(split).batches(0))

    def test_ten_are_tolerated_and_eleven_are_not(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        for index in range(10):
            overwrite(beton, index, b"no image")
        loader = open_ffcv(beton)
        assert len(list(loader.batches(0))) == 5
        assert sorted(loader.unreadable) == list(range(10))
        overwrite(beton, 15, b"no image")
        with pytest.raises(RuntimeError, match=r"^11 of 23 images cannot be read, more than the 10 that are tolerated"):
            list(loader.batches(1))

    def test_a_beton_cut_short_while_training(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        """A memory map would kill the process."""
        loader = open_ffcv(beton, SequentialOrder(num_images=23, batch_size=1), prefetch=1)
        batches = loader.batches(0)
        next(batches)
        os.truncate(beton.files[0].path, int(beton.records["offset"][4]))
        with pytest.raises(RuntimeError, match=r"^11 of 23 images cannot be read.*cut short after it was opened"):
            list(batches)

    def test_a_beton_that_is_gone(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton)
        list(loader.batches(0))
        beton.files[0].path.unlink()
        with pytest.raises(FileNotFoundError, match=r"train\.beton"):
            next(loader.batches(1))


@needs_ffcv
class TestRefusals:
    def test_other_data(self, split: Split, tmp_path: Path, open_ffcv: OpenFfcv) -> None:
        todo = r"convert the data first \(python -m dataset_tools convert SOURCE DEST --format ffcv\)"
        with pytest.raises(ValueError, match=rf"reads \.beton files alone, but 'train' is made of \w+; {todo}"):
            open_ffcv(split.subset([0, 1]))
        convert(tmp_path / "images", tmp_path / "tars", ConvertOptions(format="webdataset"), workers=1)
        with pytest.raises(ValueError, match=r"is made of tars \(train-\S+\.tar, …\); convert"):
            open_ffcv(open_source(tmp_path / "tars").splits["train"])

    def test_a_beton_that_does_not_fit_its_records(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        """Its sizes decide how much memory is written to."""
        with open(beton.files[0].path, "r+b") as file:
            file.seek(METADATA_START + 1)
            file.write((60000).to_bytes(2, "little"))
        with pytest.raises(ValueError, match=r"train\.beton does not fit .*: width differs\. Copy or convert"):
            open_ffcv(beton)

    def test_no_beton_at_all(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        beton.files[0].path.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"is no \.beton"):
            open_ffcv(beton)


def test_without_ffcv(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = converted(tmp_path / "images", tmp_path / "converted")
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "pipelines.ffcv_decoder", raising=False)
    monkeypatch.delattr("pipelines.ffcv_decoder", raising=False)
    order = SequentialOrder(num_images=23, batch_size=5)
    message = (
        r"libopencv-dev libturbojpeg0-dev pkg-config g\+\+, then make ffcv \(or pip install 'leoclr-fast\[ffcv\]'\)"
    )
    with pytest.raises(ImportError, match=rf"needs FFCV, which cannot be imported .*{message}.*torchvision loader"):
        make_loader(split, LEOCLR_VIEWS, VIEWS, LoaderConfig(name="ffcv"), order, seed=0, device=CPU)


@needs_ffcv
class TestThreads:
    def test_a_pass_that_another_one_overtook(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton)
        overtaken = loader.batches(0)
        next(overtaken)
        assert len(list(loader.batches(1))) == 5
        with pytest.raises(AssertionError, match="another pass over this loader has begun"):
            next(overtaken)

    def test_closing_and_going_on(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton)
        list(loader.batches(0))
        before = set(threading.enumerate())
        batches = loader.batches(0)
        next(batches)
        loader.close()
        loader.close()
        assert set(threading.enumerate()) <= before
        assert len(list(loader.batches(0))) == 5

    @pytest.mark.parametrize("workers", [1, 2])
    def test_abandoned_epochs_leave_nothing(self, workers: int, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton, SequentialOrder(num_images=23, batch_size=2), workers=workers)

        def abandon(epochs: range) -> tuple[int, int, float]:
            for epoch in epochs:
                if epoch % 2:
                    list(islice(loader.batches(epoch), 1 + epoch % 3))
                else:
                    batches = loader.batches(epoch)
                    next(batches)
                    batches.close()
            patience = time.monotonic() + 60  # threads of a pool end a moment after who used them
            while num_threads() > threads and time.monotonic() < patience:
                time.sleep(0.01)
            return num_threads(), len(os.listdir("/proc/self/fd")), rss_mib()

        threads = 10**6
        threads, descriptors, rss = abandon(range(10))
        later = abandon(range(50))
        assert later[0] <= threads
        assert later[1] <= descriptors
        assert later[2] <= rss + 8

    def test_trouble_in_preparing_a_batch(
        self, beton: ConvertedSplit, open_ffcv: OpenFfcv, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader = open_ffcv(beton, SequentialOrder(num_images=23, batch_size=1), prefetch=1)
        batches = loader.batches(0)
        next(batches)
        monkeypatch.setattr(ffcv_loader, "draw_boxes", lambda *_: 1 / 0)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="FFCV's next batch cannot be prepared: division by zero"):
            list(batches)
        assert time.monotonic() - began < 60

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_ffcv_s_thread_dies(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        loader = open_ffcv(beton)
        list(loader.batches(0))

        def fail(**_: object) -> None:
            raise OSError("the pipeline is broken")

        loader._ffcv.code = ([(fail, [])], [])
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="FFCV's thread has died in the middle of the epoch"):
            list(loader.batches(1))
        assert time.monotonic() - began < 60
        assert loader._pass is None

    def test_a_thread_that_hangs(
        self, beton: ConvertedSplit, open_ffcv: OpenFfcv, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader = open_ffcv(beton)
        list(loader.batches(0))
        monkeypatch.setattr(ffcv_loader, "_CLOSE_WITHIN_S", 0.5)
        loader.config = replace(loader.config, stall_timeout_s=1.0)
        released = threading.Event()
        loader._ffcv.code = ([(lambda **_: released.wait(60), [])], [])
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"has not answered for \d+ s while decoding step 0.*stall_timeout_s"):
            list(loader.batches(1))
        assert time.monotonic() - began < 50
        with pytest.raises(RuntimeError, match="hangs in an earlier pass"):
            next(loader.batches(2))
        released.set()

    def test_torch_and_numba_keep_their_numbers_of_threads(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        before = torch.get_num_threads(), numba.get_num_threads()
        torch.set_num_threads(3)
        try:
            loader = open_ffcv(beton, workers=1)
            batches = loader.batches(0)
            next(batches)
            assert (torch.get_num_threads(), numba.get_num_threads()) == (3, before[1])
            seen: list[int] = []
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert seen == [3]
        finally:
            torch.set_num_threads(before[0])

    def test_numba_s_types_stay_as_they_are(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        @numba.njit
        def first(values):  # type: ignore[no-untyped-def]
            return values[0]

        assert first(np.ones(1, dtype=np.uint8)) == 1
        open_ffcv(beton)
        assert first.nopython_signatures  # a KeyError if FFCV's change of the type were left
        assert numba.types.uint8[::1].mutable

    def test_no_more_threads_than_numba_allows(self, beton: ConvertedSplit, open_ffcv: OpenFfcv) -> None:
        assert open_ffcv(beton, workers=0).num_threads == 1
        assert open_ffcv(beton, workers=500).num_threads == numba.config.NUMBA_NUM_THREADS


MANY_THREADS = """
import sys
import numpy as np, torch
from dataset_tools.sources import open_source
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS

split = open_source(sys.argv[1]).splits["train"].subset(np.arange(230) % 23)
order = TrainOrder(num_images=230, batch_size=46, seed=0)
def open_loader(name, workers):
    config, views = LoaderConfig(name=name, workers=workers), ViewConfig(image_size=24)
    return make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=torch.device("cpu"))
ours, oracle = open_loader("ffcv", 8), open_loader("torchvision", 0)
assert ours.num_threads == 8
for epoch in range(4):
    for batch, other in zip(ours.batches(epoch), oracle.batches(epoch), strict=True):
        assert torch.equal(batch.crops, other.crops) and np.array_equal(batch.boxes, other.boxes)
assert ours.num_decodes == 4 * 230
left = ours.batches(0)
next(left)
print("the same")
"""


@needs_ffcv
def test_many_threads_and_an_end_in_the_middle(beton: ConvertedSplit) -> None:
    """Eight threads decode with scratch of their own; Python ends with a pass under way."""
    environment = os.environ | {"NUMBA_NUM_THREADS": "8"}
    folder = beton.files[0].path.parent
    done = subprocess.run(
        [sys.executable, "-c", MANY_THREADS, str(folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr
