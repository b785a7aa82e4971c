"""What `loader_timing` times: our loaders, and the ceilings over them; `baselines.loaders` has others.

Each is a generator function; each `next` handles all images once and yields a `TimedEpoch`. All but the ceilings make
the same views of each image, as uint8 on the device: LeOCLR's original and two random crops, or MoCo-v2's two crops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from dataset_tools.conversion.jpeg import START
from dataset_tools.sources import Split, open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from pipelines.byte_readers import open_bytes
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import LOADERS, make_loader, shows_images
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderTask:
    """The same for every loader."""

    data: tuple[Path, ...]
    """The same images in one or several formats; a loader takes the first that it can read."""
    views: int
    image_size: int
    batch_size: int
    workers: int
    device: str
    max_images: int | None

    @property
    def view_config(self) -> ViewConfig:
        return ViewConfig(image_size=self.image_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedEpoch:
    """All images once."""

    images: int
    seconds: float
    decodes: int
    """How many times an image was decoded in that time."""


Epochs = Iterator[TimedEpoch]
VIEWS = {2: MOCOV2_VIEWS, 3: LEOCLR_VIEWS}
"""Number of views -> the recipe that has so many."""


def timed(epoch: Callable[[int], tuple[int, int]]) -> Epochs:
    """epoch: goes through all images once, given the number of the epoch, and returns how many there were and how often
    one was decoded.
    """
    for number in count():
        began = time.perf_counter()
        images, decodes = epoch(number)
        yield TimedEpoch(images=images, seconds=time.perf_counter() - began, decodes=decodes)


def ours(name: str, task: LoaderTask) -> Epochs:
    device = torch.device(task.device)
    views = VIEWS[task.views]
    loader = None
    for split in splits(task):
        order = TrainOrder(num_images=len(split), batch_size=task.batch_size, seed=0)
        config = LoaderConfig(name=name, workers=task.workers)
        try:
            loader = make_loader(split, views, task.view_config, config, order, seed=0, device=device)
        except ValueError as error:
            refusal = error
            continue
        break
    if loader is None:
        raise refusal

    def epoch(number: int) -> tuple[int, int]:
        before, images = loader.num_decodes, 0
        for batch in loader.batches(number):
            images += len(batch.crops)
            finish(batch.crops)
        return images, loader.num_decodes - before

    with loader:
        yield from timed(epoch)


def read_only(task: LoaderTask) -> Epochs:
    """A ceiling: the encoded bytes of every batch, in the order of an epoch, and nothing made of them."""
    split = next(splits(task))
    reader = open_bytes(split)
    order = TrainOrder(num_images=len(split), batch_size=task.batch_size, seed=0)
    with ThreadPoolExecutor(max(1, task.workers)) as pool:

        def epoch(number: int) -> tuple[int, int]:
            batches = [order.indices(number, step) for step in range(order.steps_per_epoch)]
            return sum(len(encoded.images) for encoded in pool.map(reader.read, batches)), 0

        yield from timed(epoch)


def decode_only(task: LoaderTask) -> Epochs:
    """A ceiling: every JPEG decoded once by libjpeg-turbo on all threads, out of memory; no view is cut.

    Raises ValueError if there is none.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    split = next(splits(task))
    encoded = open_bytes(split).read(np.arange(len(split), dtype=np.int64))
    images = [torch.from_numpy(image) for image in encoded.images if image[:2].tobytes() == START]
    if not images:
        raise ValueError("it decodes JPEGs alone, and none of the images is one")

    def decode(image: torch.Tensor) -> int:
        return len(decode_jpeg(image, mode=ImageReadMode.RGB)) // 3

    with ThreadPoolExecutor(max(1, task.workers)) as pool:
        yield from timed(lambda _: (len(images), sum(pool.map(decode, images))))


OURS: dict[str, Callable[[LoaderTask], Epochs]] = {name: partial(ours, name) for name in LOADERS}
"""By their names of --loader."""
SHOWING_NO_IMAGES = [name for name in LOADERS if not shows_images(LoaderConfig(name=name))]
CEILINGS: dict[str, Callable[[LoaderTask], Epochs]] = {"read-only": read_only, "decode-only": decode_only}
"""What no loader can be faster than on this machine, by name."""


def finish(crops: torch.Tensor) -> None:
    """Wait until the crops are there: the next batch must not be started on the cheap."""
    if crops.is_cuda:
        torch.cuda.current_stream(crops.device).synchronize()


def splits(task: LoaderTask) -> Iterator[Split]:
    """The images in each of their formats."""
    for path in task.data:
        yield limited(choose_splits(open_source(path)).pretrain, task.max_images)
