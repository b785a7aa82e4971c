"""What holds for every loader: the same images, boxes and pixels, from any step, on any number of ranks and workers;
unreadable images are replaced; one decode of each; nothing is left behind.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.config import ViewConfig
from pipelines.decode import max_unreadable
from pipelines.factory import LOADERS, loader_class
from pipelines.loader import Loader
from pipelines.order import SequentialOrder, TrainOrder
from pipelines.views import CENTER_CROP_VIEWS, LEOCLR_VIEWS
from tests.pipelines.optional_packages import HAS_DALI, HAS_FFCV, needs_dali, needs_ffcv
from tests.pipelines.oracle import (
    SEED,
    assert_is,
    assert_like_the_oracle,
    assert_same,
    in_order,
    plain_batch,
    train_order,
)
from tests.pipelines.pictures import encode, picture, write_images

MARKS = {"dali": needs_dali, "ffcv": needs_ffcv}


def kinds(*names: str) -> list[object]:
    """Names of loaders with their workers, as parameters."""
    pairs = [(name.split("-")[0], int(name.split("-")[1])) for name in names]
    return [pytest.param(pair, id="-".join(map(str, pair)), marks=MARKS.get(pair[0], ())) for pair in pairs]


ONE_OF_EACH = ("resident-1", "torchvision-0", "torchvision-2", "dali-2", "nvjpeg-2", "ffcv-2")

Kind = tuple[str, int]
OpenLoader = Callable[..., Loader]


def test_every_loader_is_here() -> None:
    assert {name.split("-")[0] for name in ONE_OF_EACH} == set(LOADERS) - {"synthetic"}


@pytest.mark.parametrize("kind", kinds(*ONE_OF_EACH))
class TestEveryLoader:
    def test_equals_the_plainest_way(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind[0], workers=kind[1])
        assert type(loader) is loader_class(kind[0])
        assert loader.name == kind[0]
        assert loader.steps_per_epoch == 4
        for epoch in (0, 1, 7):
            batches = list(loader.batches(epoch))
            assert [(batch.epoch, batch.step) for batch in batches] == [(epoch, step) for step in range(4)]
            for batch in batches:
                indices = loader.order.indices(epoch, batch.step)
                assert batch.crops.shape == (5, 3, 16, 16, 3)
                assert_is(batch, plain_batch(split, indices, epoch))
        assert loader.unreadable == {}

    @pytest.mark.parametrize("original", ["pad", "center_crop", "evaluation"])
    def test_whole_images_as_squares(self, kind: Kind, original: str, split: Split, open_loader: OpenLoader) -> None:
        """What is filled up or cut out, to the last bit: LeOCLR's original, and the evaluation's crop."""
        config = ViewConfig(image_size=16, original="pad" if original == "evaluation" else original)  # type: ignore[arg-type]
        views = CENTER_CROP_VIEWS if original == "evaluation" else LEOCLR_VIEWS
        loader = open_loader(split, kind[0], None, views, workers=kind[1], original=config.original)
        for batch in loader.batches(0):
            assert_is(batch, plain_batch(split, loader.order.indices(0, batch.step), 0, views, config))

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_share_the_batches(self, kind: Kind, world_size: int, split: Split, open_loader: OpenLoader) -> None:
        alone, *ranks = (
            open_loader(split, kind[0], order, workers=kind[1])
            for order in (
                train_order(split),
                *(train_order(split, rank=rank, world_size=world_size) for rank in range(world_size)),
            )
        )
        for whole, *parts in zip(alone.batches(2), *(rank.batches(2) for rank in ranks), strict=True):
            assert torch.equal(torch.cat([part.crops for part in parts]), whole.crops)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            assert np.array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
            assert np.array_equal(np.concatenate([part.boxes for part in parts]), whole.boxes)

    def test_an_epoch_from_the_middle(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind[0], workers=kind[1])
        whole = list(loader.batches(3))
        for start_step in (0, 1, 3, 4):
            assert_same(list(loader.batches(3, start_step)), whole[start_step:])

    def test_another_epoch_after_one_that_was_left(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind[0], workers=kind[1])
        left = loader.batches(0)
        list(islice(left, 2))  # left, but still referred to
        for epoch in (1, 0, 5):
            list(islice(loader.batches(epoch + 100), 1))
            for batch in loader.batches(epoch):
                assert_is(batch, plain_batch(split, loader.order.indices(epoch, batch.step), epoch))
        with pytest.raises(AssertionError, match="another pass over this loader has begun"):
            next(left)

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_evaluation_sees_every_image_once(
        self, kind: Kind, world_size: int, split: Split, open_loader: OpenLoader
    ) -> None:
        """23 images in batches of 11: the last batch is one image, and none on the second rank."""
        seen: list[int] = []
        for rank in range(world_size):
            order = SequentialOrder(num_images=23, batch_size=11, rank=rank, world_size=world_size)
            batches = list(open_loader(split, kind[0], order, CENTER_CROP_VIEWS, workers=kind[1]).batches(0))
            assert [batch.step for batch in batches] == [0, 1, 2]
            for batch in batches:
                indices = order.indices(0, batch.step)
                assert batch.crops.shape == (len(indices), 1, 16, 16, 3)
                assert_is(batch, plain_batch(split, indices, 0, CENTER_CROP_VIEWS))
                seen += indices.tolist()
        assert sorted(seen) == list(range(23))

    def test_torch_s_random_numbers_are_left_alone(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        loader = open_loader(split, kind[0], workers=kind[1])
        for epoch in range(2):
            list(loader.batches(epoch))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]

    def test_an_image_among_others_of_every_kind(self, kind: Kind, tmp_path: Path, open_loader: OpenLoader) -> None:
        """Gray, palette, alpha, CMYK, 16 bits, other formats, an orientation that no loader follows, something behind a
        JPEG's end, one pixel high, larger and smaller than the view.
        """
        waves = Image.fromarray(picture(40, 50, "waves"))
        deep = Image.fromarray(np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50)
        turned = Image.Exif()
        turned[0x0112] = 6
        images = {
            "alpha.png": encode(waves.convert("RGBA"), "PNG"),
            "behind the end.jpg": encode(waves, "JPEG") + b"more",
            "cmyk.jpg": encode(waves.convert("CMYK"), "JPEG"),
            "column.png": encode(Image.fromarray(picture(50, 1)), "PNG"),
            "deep.png": encode(deep, "PNG"),
            "gray.jpg": encode(waves.convert("L"), "JPEG"),
            "large.png": encode(Image.fromarray(picture(300, 200)), "PNG"),
            "megapixel.jpg": encode(Image.fromarray(picture(1200, 900, "waves")), "JPEG"),
            "palette.png": encode(waves.convert("P"), "PNG"),
            "pixel.png": encode(Image.fromarray(picture(1, 1)), "PNG"),
            "progressive.jpg": encode(waves, "JPEG", progressive=True, subsampling=0),
            "rgb.jpg": encode(waves, "JPEG", keep_rgb=True),
            "row.png": encode(Image.fromarray(picture(1, 50)), "PNG"),
            "small.gif": encode(waves, "GIF"),
            "small.webp": encode(waves, "WEBP", lossless=True),
            "turned.jpg": encode(waves, "JPEG", exif=turned),
        }
        split = write_images(tmp_path / "kinds", images)
        loader = open_loader(split, kind[0], in_order(split), workers=kind[1])
        for epoch in range(2):
            for batch in loader.batches(epoch):
                assert (batch.labels == -1).all()
                # Converting encodes some of them anew.
                assert_is(batch, plain_batch(loader.split, loader.order.indices(epoch, batch.step), epoch))
        assert loader.unreadable == {}


@pytest.mark.parametrize("kind", kinds(*ONE_OF_EACH))
class TestManners:
    def test_one_decode_of_each_image(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind[0], in_order(split), workers=kind[1])
        for epoch in range(3):
            assert sum(len(batch.indices) for batch in loader.batches(epoch)) == 23
            assert loader.num_decodes == (23 if kind[0] == "resident" else 23 * (epoch + 1))

    def test_batches_are_nobody_else_s_memory(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind[0], in_order(split, 1), workers=kind[1], prefetch_batches=1)
        kept = list(loader.batches(0))
        list(loader.batches(1))
        assert len({batch.crops.data_ptr() for batch in kept}) == 23
        for batch in kept:
            assert_is(batch, plain_batch(split, batch.indices, 0))

    @pytest.mark.parametrize("prefetch_batches", [1, 7])
    def test_prefetching_changes_nothing(
        self, kind: Kind, prefetch_batches: int, split: Split, open_loader: OpenLoader
    ) -> None:
        """Also where more may be read and decoded ahead than an epoch has steps."""
        loader = open_loader(split, kind[0], workers=kind[1], prefetch_batches=prefetch_batches)
        for batch in loader.batches(1):
            assert_is(batch, plain_batch(split, loader.order.indices(1, batch.step), 1))

    def test_closing_and_going_on(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        threads, processes = set(threading.enumerate()), set(multiprocessing.active_children())
        loader = open_loader(split, kind[0], workers=kind[1])
        first = list(loader.batches(1))
        for use in (lambda: None, lambda: next(loader.batches(2)), lambda: list(loader.batches(2))):
            use()
            loader.close()
            loader.close()
            assert set(multiprocessing.active_children()) <= processes
            patience = time.monotonic() + 20  # a helper thread may end a moment later
            while not only_pools_beside(threads) and time.monotonic() < patience:
                time.sleep(0.01)
            assert only_pools_beside(threads)
        assert_same(list(loader.batches(1)), first)

    def test_abandoned_epochs_leave_nothing(self, kind: Kind, split: Split, open_loader: OpenLoader) -> None:
        """Threads of this process, a decoder's among them, open files, children, and memory: less than one for five of
        50 epochs. Not to the last one, since what tests before this one have left goes away meanwhile.
        """
        loader = open_loader(split, kind[0], workers=kind[1], image_size=64, prefetch_batches=3)
        process, states = psutil.Process(), []
        for epoch in range(60):
            batches = loader.batches(epoch)
            list(islice(batches, epoch % 5))
            if epoch % 2:
                batches.close()
            if epoch in (9, 59):
                list(loader.batches(100))
                states.append(
                    (len(os.listdir("/proc/self/task")), process.num_fds(), len(process.children()), memory(process))
                )
        (*before, used), (*after, used_later) = states
        assert all(later - earlier < 10 for later, earlier in zip(after, before, strict=True))
        assert used_later <= used + 10 * 2**20


def only_pools_beside(threads: set[threading.Thread]) -> bool:
    """Whether there are no threads beside those and the ones that compiled loops keep for the whole process."""
    return all(thread.name.startswith("compiled loop") for thread in set(threading.enumerate()) - threads)


def memory(process: psutil.Process) -> int:
    """Bytes that are resident."""
    return int(process.memory_info().rss)


@pytest.mark.parametrize("kind", kinds("torchvision-2", "dali-2", "ffcv-2"))
def test_a_program_that_ends_without_closing(
    kind: Kind, split: Split, as_beton: Callable[[Split], Split], tmp_path: Path
) -> None:
    """DALI aborts where its own clean-up meets a thread that still waits for it."""
    if kind[0] == "ffcv":
        as_beton(split)
    folder = tmp_path / ("beton" if kind[0] == "ffcv" else "images")
    script = (
        "from dataset_tools.sources import open_source; from tests.pipelines.oracle import open_by_name\n"
        f"split = open_source({str(folder)!r}).splits['train']\n"
        f"batches = open_by_name({kind[0]!r}, split, workers={kind[1]}).batches(0)\n"
        "next(batches)\n"
        "raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stderr
    assert "Exception ignored" not in done.stderr
    assert "abort" not in done.stderr.lower()


@pytest.mark.real_data
@pytest.mark.parametrize("source", ["folder", "tar", "ffcv", "webdataset"])
def test_photographs(source: str, real_data: Path, tmp_path: Path, open_loader: OpenLoader) -> None:
    photographs = open_source(real_data / "imagenet-sample-400.tar").splits["train"].subset(np.arange(0, 400, 25))
    split = photographs
    if source != "tar":
        images = {f"{index:03}.jpg": photographs.read(index) for index in range(len(photographs))}
        split = write_images(tmp_path / "photographs", images)
    if source in ("ffcv", "webdataset"):
        convert(tmp_path / "photographs", tmp_path / source, ConvertOptions(format=source), workers=1)  # type: ignore[arg-type]
        split = open_source(tmp_path / source).splits["train"]
    for name in ("resident", "nvjpeg", *["dali"] * HAS_DALI, *["ffcv"] * (HAS_FFCV and source == "ffcv")):
        loader = open_loader(split, name, in_order(split), workers=2, image_size=224)
        assert_like_the_oracle(loader)
        assert loader.unreadable == {}


REPLACED = {
    "one": ([9], {9: 10}),
    "first": ([0], {0: 1}),
    "two in a row": ([4, 5], {4: 6, 5: 6}),
    "last": ([22], {22: 0}),
    "around the end": ([21, 22, 0, 1], {21: 2, 22: 2, 0: 2, 1: 2}),
    "two of one class, one of another": ([6, 7, 15], {6: 8, 7: 8, 15: 16}),
}


@pytest.mark.parametrize("kind", kinds(*ONE_OF_EACH))
class TestUnreadableImages:
    @pytest.fixture
    def damaged(
        self, kind: Kind, damage: Callable[..., None], as_beton: Callable[[Split], Split]
    ) -> Callable[..., Split]:
        """Damages images of a split, and hands out what the loader reads."""

        def make(split: Split, *indices: int, how: str = "text") -> Split:
            split = as_beton(split) if kind[0] == "ffcv" else split
            damage(split, *indices, how=how)
            return split

        return make

    @pytest.mark.parametrize("case", REPLACED)
    def test_the_next_image_takes_the_place(
        self,
        kind: Kind,
        case: str,
        split: Split,
        damaged: Callable[..., Split],
        open_loader: OpenLoader,
        package_log: pytest.LogCaptureFixture,
    ) -> None:
        bad, substitutes = REPLACED[case]
        split = damaged(split, *bad)
        loader = open_loader(split, kind[0], in_order(split), workers=kind[1])
        for epoch in (0, 1):
            for batch in loader.batches(epoch):
                wanted = loader.order.indices(epoch, batch.step)
                taken = np.array([substitutes.get(index, index) for index in wanted.tolist()])
                assert_is(batch, plain_batch(split, taken, epoch))
        assert sorted(loader.unreadable) == sorted(bad)
        warnings = [record.getMessage() for record in package_log.records if record.levelno == logging.WARNING]
        reasons = [f"cannot read {split.names[index]} ({loader.unreadable[index]})" for index in bad]
        assert sorted(warnings) == sorted(f"{reason}; the next image takes its place" for reason in reasons)
        assert all(loader.unreadable.values())

    @pytest.mark.parametrize("num_images", [1, 7, 10])
    def test_none_can_be_read(
        self,
        kind: Kind,
        num_images: int,
        write_split: Callable[..., Split],
        damaged: Callable[..., Split],
        open_loader: OpenLoader,
    ) -> None:
        split = damaged(write_split(num_images), *range(num_images))
        order = TrainOrder(num_images=num_images, batch_size=1, seed=SEED)
        message = rf"none of the {num_images} images can be read; .*a/000\.jpg: it is no image"
        with pytest.raises(ValueError, match=message) as raised:
            list(open_loader(split, kind[0], order, workers=kind[1]).batches(0))
        assert "\n" not in str(raised.value)  # no worker's traceback

    def test_ten_are_tolerated_and_eleven_are_not(
        self, kind: Kind, split: Split, damaged: Callable[..., Split], open_loader: OpenLoader
    ) -> None:
        split = damaged(split, *range(10))
        loader = open_loader(split, kind[0], in_order(split), workers=kind[1])
        assert len(list(loader.batches(0))) == 5
        assert sorted(loader.unreadable) == list(range(10))
        damaged(split, 10)
        message = (
            r"^11 of 23 images cannot be read, more than the 10 that are tolerated \(1 %, at least 10\); the last one "
            r"is \S*[ab]/0\d\d\.jpg: it is no image .*\. Check the data set\.$"
        )
        with pytest.raises(RuntimeError, match=message):
            list(open_loader(split.subset(np.arange(23)), kind[0], in_order(split), workers=kind[1]).batches(0))


@pytest.mark.parametrize("kind", kinds(*(name for name in ONE_OF_EACH if name != "ffcv-2")))
@pytest.mark.parametrize("how", ["empty", "cut short", "missing"])
def test_any_damage(kind: Kind, how: str, split: Split, damage: Callable[..., None], open_loader: OpenLoader) -> None:
    damage(split, 3, how=how)
    loader = open_loader(split, kind[0], in_order(split, 23), workers=kind[1])
    (batch,) = loader.batches(0)
    assert list(loader.unreadable) == [3]
    assert_is(batch, plain_batch(split, np.where(np.arange(23) == 3, 4, np.arange(23)), 0))


@pytest.mark.parametrize(
    ("num_images", "tolerated"), [(1, 10), (1000, 10), (1099, 10), (1100, 11), (1_281_167, 12_811)]
)
def test_one_percent_and_at_least_ten(num_images: int, tolerated: int) -> None:
    assert max_unreadable(num_images) == tolerated
