"""What holds for every loader: the same images, boxes and pixels, from any step, on any number of ranks and workers."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.decode import max_unreadable
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.nvjpeg_loader import NvjpegLoader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import CENTER_CROP_VIEWS, LEOCLR_VIEWS, MOCOV2_VIEWS, ViewRecipe, draw_boxes
from tests.pipelines.optional_packages import needs_dali, needs_ffcv
from tests.pipelines.pictures import picture

SEED = 11
VIEWS = ViewConfig(image_size=16)
CPU = torch.device("cpu")
LOADERS = [("resident", 1), ("resident", 0), ("torchvision", 0), ("torchvision", 1), ("torchvision", 2)]
NAMES = [f"{name}-{workers}" for name, workers in LOADERS]
DALI = [pytest.param(("dali", workers), id=f"dali-{workers}", marks=needs_dali) for workers in (1, 2)]
NVJPEG = [pytest.param(("nvjpeg", workers), id=f"nvjpeg-{workers}") for workers in (1, 2)]
FFCV = [pytest.param(("ffcv", workers), id=f"ffcv-{workers}", marks=needs_ffcv) for workers in (1, 2)]
EVERY_LOADER = [
    *(pytest.param(kind, id=name) for kind, name in zip(LOADERS, NAMES, strict=True)),
    *DALI,
    *NVJPEG,
    *FFCV,
]

OpenLoader = Callable[..., Loader]


def train_order(split: Split, batch_size: int = 5, rank: int = 0, world_size: int = 1) -> TrainOrder:
    return TrainOrder(num_images=len(split), batch_size=batch_size, seed=SEED, rank=rank, world_size=world_size)


@pytest.fixture
def open_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenLoader]:
    """Opens loaders and closes them when the test ends. FFCV's reads the same images, converted; nvJPEG's has a CPU
    decoder in place of the GPU's.
    """
    monkeypatch.setattr(NvjpegLoader, "devices", ("cpu", "cuda"))
    with ExitStack() as stack:

        def start(
            split: Split,
            kind: tuple[str, int] = ("resident", 1),
            order: Order | None = None,
            views: ViewRecipe = LEOCLR_VIEWS,
            **config: int,
        ) -> Loader:
            name, workers = kind
            if name == "ffcv":
                options = ConvertOptions(format="ffcv", order="source")
                convert(split.root, tmp_path / "converted", options, workers=1)  # type: ignore[attr-defined]
                split = open_source(tmp_path / "converted").splits["train"]
            settings = LoaderConfig(name=name, workers=workers, **config)
            loader = make_loader(split, views, VIEWS, settings, order or train_order(split), seed=SEED, device=CPU)
            return stack.enter_context(loader)

        yield start


def plain_batch(
    split: Split, indices: np.ndarray, epoch: int, views: ViewRecipe = LEOCLR_VIEWS
) -> dict[str, np.ndarray]:
    """A batch made in the plainest way: image by image, view by view, with Pillow."""
    images = [Image.open(io.BytesIO(split.read(int(index)))).convert("RGB") for index in indices]
    heights, widths = (np.array([getattr(image, side) for image in images]) for side in ("height", "width"))
    boxes = draw_boxes(views, VIEWS, heights, widths, SEED, epoch, indices)
    crops = np.zeros((len(images), len(views), 16, 16, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        for column in range(len(views)):
            top, left, height, width = boxes[row, column].tolist()
            crop = image.crop((left, top, left + width, top + height))
            crops[row, column] = crop.resize((16, height), Image.Resampling.BILINEAR).resize(
                (16, 16), Image.Resampling.BILINEAR
            )
    return {"indices": indices, "labels": split.labels[indices], "boxes": boxes, "crops": crops}


def assert_is(batch: CropBatch, expected: dict[str, np.ndarray]) -> None:
    """Everything is equal."""
    assert batch.crops.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    assert batch.boxes.dtype == np.int32
    for name, value in expected.items():
        assert np.array_equal(np.asarray(getattr(batch, name)), value), name


def assert_same(ours: list[CropBatch], theirs: list[CropBatch]) -> None:
    assert [(batch.epoch, batch.step) for batch in ours] == [(batch.epoch, batch.step) for batch in theirs]
    for batch, other in zip(ours, theirs, strict=True):
        assert_is(batch, {name: np.asarray(getattr(other, name)) for name in ("indices", "labels", "boxes", "crops")})


@pytest.mark.parametrize("kind", EVERY_LOADER)
class TestEveryLoader:
    def test_equals_the_plainest_way(self, kind: tuple[str, int], split: Split, open_loader: OpenLoader) -> None:
        loader = open_loader(split, kind)
        assert loader.steps_per_epoch == 4
        for epoch in (0, 1, 7):
            batches = list(loader.batches(epoch))
            assert [(batch.epoch, batch.step) for batch in batches] == [(epoch, step) for step in range(4)]
            for batch in batches:
                indices = loader.order.indices(epoch, batch.step)
                assert batch.crops.shape == (5, 3, 16, 16, 3)
                assert_is(batch, plain_batch(split, indices, epoch))
        assert loader.unreadable == {}

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_share_the_batches(
        self, kind: tuple[str, int], world_size: int, split: Split, open_loader: OpenLoader
    ) -> None:
        alone = open_loader(split, kind)
        ranks = [
            open_loader(split, kind, train_order(split, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        for whole, *parts in zip(alone.batches(2), *(rank.batches(2) for rank in ranks), strict=True):
            assert torch.equal(torch.cat([part.crops for part in parts]), whole.crops)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            assert np.array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
            assert np.array_equal(np.concatenate([part.boxes for part in parts]), whole.boxes)

    @pytest.mark.parametrize("start_step", [0, 1, 3, 4])
    def test_an_epoch_from_the_middle(
        self, kind: tuple[str, int], start_step: int, split: Split, open_loader: OpenLoader
    ) -> None:
        loader = open_loader(split, kind)
        whole = list(loader.batches(3))
        assert_same(list(loader.batches(3, start_step)), whole[start_step:])

    def test_another_epoch_after_one_that_was_left(
        self, kind: tuple[str, int], split: Split, open_loader: OpenLoader
    ) -> None:
        loader = open_loader(split, kind)
        left = loader.batches(0)
        list(islice(left, 2))  # left, but still referred to
        for epoch in (1, 0, 5):
            list(islice(loader.batches(epoch + 100), 1))
            for batch in loader.batches(epoch):
                assert_is(batch, plain_batch(split, loader.order.indices(epoch, batch.step), epoch))

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_evaluation_sees_every_image_once(
        self, kind: tuple[str, int], world_size: int, split: Split, open_loader: OpenLoader
    ) -> None:
        """23 images in batches of 11: the last batch is one image, and none on the second rank."""
        seen: list[int] = []
        for rank in range(world_size):
            order = SequentialOrder(num_images=23, batch_size=11, rank=rank, world_size=world_size)
            loader = open_loader(split, kind, order, CENTER_CROP_VIEWS)
            batches = list(loader.batches(0))
            assert [batch.step for batch in batches] == [0, 1, 2]
            for batch in batches:
                indices = order.indices(0, batch.step)
                assert batch.crops.shape == (len(indices), 1, 16, 16, 3)
                assert_is(batch, plain_batch(split, indices, 0, CENTER_CROP_VIEWS))
                seen += indices.tolist()
        assert sorted(seen) == list(range(23))

    def test_torch_s_random_numbers_are_left_alone(
        self, kind: tuple[str, int], split: Split, open_loader: OpenLoader
    ) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        loader = open_loader(split, kind)
        for epoch in range(2):
            list(loader.batches(epoch))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]

    def test_an_image_among_others_of_every_kind(
        self, kind: tuple[str, int], tmp_path: Path, open_loader: OpenLoader
    ) -> None:
        """Gray, palette, alpha, CMYK, one pixel high, larger and smaller than the view."""
        pixels = Image.fromarray(picture(30, 40, "waves"))
        folder = tmp_path / "kinds"
        folder.mkdir()
        pixels.convert("L").save(folder / "gray.jpg")
        pixels.convert("CMYK").save(folder / "cmyk.jpg")
        pixels.convert("P").save(folder / "palette.png")
        pixels.convert("RGBA").save(folder / "alpha.png")
        Image.fromarray(picture(1, 50)).save(folder / "row.png")
        Image.fromarray(picture(50, 1)).save(folder / "column.png")
        Image.fromarray(picture(1, 1)).save(folder / "pixel.png")
        Image.fromarray(picture(300, 200)).save(folder / "large.png")
        split = open_source(folder).splits["train"]
        loader = open_loader(split, kind, train_order(split, batch_size=4))
        for epoch in range(3):
            for batch in loader.batches(epoch):
                assert (batch.labels == -1).all()
                # Converting encodes some of them anew.
                assert_is(batch, plain_batch(loader.split, loader.order.indices(epoch, batch.step), epoch))


class TestLoadersAgree:
    def test_leoclr_and_mocov2_get_the_same_crops(self, split: Split, open_loader: OpenLoader) -> None:
        leoclr = open_loader(split)
        mocov2 = open_loader(split, ("torchvision", 0), views=MOCOV2_VIEWS)
        for ours, theirs in zip(leoclr.batches(0), mocov2.batches(0), strict=True):
            assert torch.equal(ours.crops[:, 1:], theirs.crops)
            assert np.array_equal(ours.boxes[:, 1:], theirs.boxes)

    def test_prefetching_changes_nothing(self, split: Split, open_loader: OpenLoader) -> None:
        expected = list(open_loader(split).batches(1))
        for prefetch in (1, 7):
            loader = open_loader(split, ("torchvision", 2), prefetch_batches=prefetch)
            assert_same(list(loader.batches(1)), expected)

    @pytest.mark.real_data
    def test_on_photographs(self, real_data: Path, open_loader: OpenLoader) -> None:
        split = open_source(real_data / "imagenet-sample-400.tar").splits["train"].subset(np.arange(0, 400, 13))
        order = SequentialOrder(num_images=len(split), batch_size=8)
        resident, oracle = (open_loader(split, kind, order) for kind in (("resident", 1), ("torchvision", 0)))
        assert_same(list(resident.batches(0)), list(oracle.batches(0)))


REPLACED = {
    "one": ([9], {9: 10}),
    "first": ([0], {0: 1}),
    "two in a row": ([4, 5], {4: 6, 5: 6}),
    "last": ([22], {22: 0}),
    "around the end": ([21, 22, 0, 1], {21: 2, 22: 2, 0: 2, 1: 2}),
    "two of one class, one of another": ([6, 7, 15], {6: 8, 7: 8, 15: 16}),
}


@pytest.mark.parametrize("kind", [*EVERY_LOADER[1:4], *DALI, *NVJPEG])
class TestUnreadableImages:
    @pytest.mark.parametrize("case", REPLACED)
    def test_the_next_image_takes_the_place(
        self,
        kind: tuple[str, int],
        case: str,
        split: Split,
        damage: Callable[..., None],
        open_loader: OpenLoader,
        package_log: pytest.LogCaptureFixture,
    ) -> None:
        bad, substitutes = REPLACED[case]
        damage(split, *bad)
        loader = open_loader(split, kind, SequentialOrder(num_images=23, batch_size=5))
        for epoch in (0, 1):
            for batch in loader.batches(epoch):
                wanted = loader.order.indices(epoch, batch.step)
                taken = np.array([substitutes.get(index, index) for index in wanted.tolist()])
                assert_is(batch, plain_batch(split, taken, epoch))
        assert sorted(loader.unreadable) == sorted(bad)
        warnings = [record.getMessage() for record in package_log.records if record.levelno == logging.WARNING]
        assert len(warnings) == len(bad)
        for index in bad:
            reason = loader.unreadable[index]
            assert reason
            expected = f"cannot read {split.names[index]} ({reason}); the next image takes its place"
            assert warnings.count(expected) == 1

    @pytest.mark.parametrize("how", ["text", "empty", "cut short", "missing"])
    def test_any_damage(
        self, kind: tuple[str, int], how: str, split: Split, damage: Callable[..., None], open_loader: OpenLoader
    ) -> None:
        damage(split, 3, how=how)
        loader = open_loader(split, kind, SequentialOrder(num_images=23, batch_size=23))
        (batch,) = loader.batches(0)
        assert list(loader.unreadable) == [3]
        taken = np.array([4 if index == 3 else index for index in range(23)])
        assert_is(batch, plain_batch(split, taken, 0))

    @pytest.mark.parametrize("num_images", [1, 7, 10])
    def test_none_can_be_read(
        self,
        kind: tuple[str, int],
        num_images: int,
        write_split: Callable[..., Split],
        damage: Callable[..., None],
        open_loader: OpenLoader,
    ) -> None:
        split = write_split(num_images)
        damage(split, *range(num_images))
        order = TrainOrder(num_images=num_images, batch_size=1, seed=SEED)
        with pytest.raises(
            ValueError, match=rf"none of the {num_images} images can be read; a/000\.jpg: cannot identify"
        ):
            list(open_loader(split, kind, order).batches(0))

    def test_too_many(
        self, kind: tuple[str, int], split: Split, damage: Callable[..., None], open_loader: OpenLoader
    ) -> None:
        damage(split, *range(11))
        message = (
            r"^11 of 23 images cannot be read, more than the 10 that are tolerated \(1 %, at least 10\); the last one "
            r"is [ab]/0\d\d\.jpg: cannot identify image file .*\. Check the data set\.$"
        )
        order = SequentialOrder(num_images=23, batch_size=5)
        with pytest.raises(RuntimeError, match=message):
            list(open_loader(split, kind, order).batches(0))

    def test_ten_are_tolerated(
        self, kind: tuple[str, int], split: Split, damage: Callable[..., None], open_loader: OpenLoader
    ) -> None:
        damage(split, *range(10))
        loader = open_loader(split, kind, SequentialOrder(num_images=23, batch_size=5))
        assert len(list(loader.batches(0))) == 5
        assert sorted(loader.unreadable) == list(range(10))


@pytest.mark.parametrize(
    ("num_images", "tolerated"), [(1, 10), (1000, 10), (1099, 10), (1100, 11), (1_281_167, 12_811)]
)
def test_one_percent_and_at_least_ten(num_images: int, tolerated: int) -> None:
    assert max_unreadable(num_images) == tolerated


def test_one_percent_of_many(open_loader: OpenLoader, split: Split) -> None:
    many = split.subset(np.arange(1200) % 23)
    loader = open_loader(many, ("synthetic", 0))
    for index in range(12):
        loader.report_unreadable(index, "why")
        loader.report_unreadable(index, "told already")
    with pytest.raises(RuntimeError, match="13 of 1200 images cannot be read, more than the 12 that are tolerated"):
        loader.report_unreadable(12, "why")
    assert set(loader.unreadable.values()) == {"why"}
