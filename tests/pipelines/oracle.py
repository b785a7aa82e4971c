"""What loaders are held against: batches made in the plainest way, and torchvision's loader."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from dataset_tools.sources import Split
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import Order, SequentialOrder, TrainOrder
from pipelines.views import LEOCLR_VIEWS, ViewRecipe, draw_boxes

SEED = 11
CPU = torch.device("cpu")


def train_order(split: Split, batch_size: int = 5, rank: int = 0, world_size: int = 1) -> TrainOrder:
    return TrainOrder(num_images=len(split), batch_size=batch_size, seed=SEED, rank=rank, world_size=world_size)


def in_order(split: Split, batch_size: int = 5) -> SequentialOrder:
    return SequentialOrder(num_images=len(split), batch_size=batch_size)


def open_by_name(
    name: str,
    split: Split,
    order: Order | None = None,
    views: ViewRecipe = LEOCLR_VIEWS,
    *,
    image_size: int = 16,
    device: str = "cpu",
    original: str = "squash",
    **config: float,
) -> Loader:
    """A loader of LeOCLR's views, by default in a shuffled order of batches of 5."""
    settings = LoaderConfig(name=name, **config)  # type: ignore[arg-type]
    view_config = ViewConfig(image_size=image_size, original=original)  # type: ignore[arg-type]
    order = order or train_order(split)
    return make_loader(split, views, view_config, settings, order, seed=SEED, device=torch.device(device))


def plain_image(data: bytes) -> Image.Image:
    """In RGB, of 16 bits the upper 8."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def cut(image: Image.Image, placed: list[int], size: int, fill: tuple[int, int, int]) -> Image.Image:
    """A view by Pillow, one side after the other: its order changed with version 13."""
    top, left, height, width, new_height, new_width, row, column = placed
    crop = image.crop((left, top, left + width, top + height))
    narrow = crop.resize((new_width, height), Image.Resampling.BILINEAR)
    view = Image.new("RGB", (size, size), fill)
    view.paste(narrow.resize((new_width, new_height), Image.Resampling.BILINEAR), (-column, -row))
    return view


def plain_batch(
    split: Split,
    indices: np.ndarray,
    epoch: int,
    views: ViewRecipe = LEOCLR_VIEWS,
    config: ViewConfig | None = None,
) -> dict[str, np.ndarray]:
    """A batch made in the plainest way: image by image, view by view, with Pillow."""
    config = config or ViewConfig(image_size=16)
    images = [plain_image(split.read(int(index))) for index in indices]
    heights, widths = (np.array([getattr(image, side) for image in images]) for side in ("height", "width"))
    boxes = draw_boxes(views, config, heights, widths, SEED, epoch, indices)
    crops = np.zeros((len(images), len(views), 16, 16, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        for column in range(len(views)):
            crops[row, column] = cut(image, boxes[row, column].tolist(), 16, config.fill)
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


def assert_like_the_oracle(loader: Loader, epochs: int = 1) -> None:
    """Everything is equal to what torchvision's loader hands out, to the last bit."""
    size = loader.view_config.image_size
    truth = open_by_name("torchvision", loader.split, loader.order, image_size=size, workers=0)
    for epoch in range(epochs):
        assert_same(list(loader.batches(epoch)), list(truth.batches(epoch)))
    assert sorted(loader.unreadable) == sorted(truth.unreadable)
