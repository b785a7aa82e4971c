"""Batches without end for a timing: of synthetic or of real images, one loader for each list of views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch

from dataset_tools.sources import Split, open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.config import ResultConfig
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig
from pipelines.factory import make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.views import ViewRecipe

_SYNTHETIC_STEPS = 64

Feeds = dict[ViewRecipe, Iterator[CropBatch]]


class UnreadImages(Split):
    """So many unlabelled images that nobody reads: what the synthetic loader is given."""

    def __init__(self, num_images: int) -> None:
        self.name = "synthetic"
        self.labels = np.full(num_images, -1, dtype=np.int64)
        self.names = [f"synthetic {number}" for number in range(num_images)]
        self.classes = ()

    def read(self, index: int) -> bytes:
        raise OSError(f"{self.names[index]} does not exist")


def training_images(data: Path | None, result: ResultConfig, max_images: int | None = None) -> Split:
    """The images that `pretrain` would train on; without `data`, images that only the synthetic loader can use.

    Raises ValueError for data that cannot be read, or with fewer images than one batch.
    """
    if data is None:
        return UnreadImages(_SYNTHETIC_STEPS * result.batch_size)
    split = limited(choose_splits(open_source(data)).pretrain, max_images)
    if len(split) < result.batch_size:
        raise ValueError(
            f"{data} has {len(split)} images to train on, fewer than one batch of {result.batch_size}; give more "
            "images or a smaller --batch-size"
        )
    return split


@contextmanager
def open_feeds(
    split: Split, recipes: Sequence[ViewRecipe], result: ResultConfig, config: LoaderConfig, device: torch.device
) -> Iterator[tuple[Feeds, str]]:
    """Batches of each of `recipes`, epoch after epoch, from loaders with the same settings; and the loader's name.

    The images and the crops are those of the seed: the same in every feed.
    Raises what `make_loader` raises.
    """
    order = TrainOrder(num_images=len(split), batch_size=result.batch_size, seed=result.seed)
    settled = settle_loader(split, config, device)
    with ExitStack() as stack:
        feeds: Feeds = {}
        for views in recipes:
            loader = stack.enter_context(
                make_loader(split, views, result.views, settled, order, seed=result.seed, device=device)
            )
            feeds[views] = _endless(loader)
        yield feeds, settled.name
        for feed in feeds.values():
            feed.close()  # type: ignore[attr-defined]


def _endless(loader: Loader) -> Iterator[CropBatch]:
    for epoch in count():
        yield from loader.batches(epoch)
