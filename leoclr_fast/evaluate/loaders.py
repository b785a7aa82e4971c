"""The loaders of an evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import torch

from dataset_tools.sources import Split
from leoclr_fast.distributed.collectives import Ranks
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import SequentialOrder, TrainOrder
from pipelines.views import CENTER_CROP_VIEWS, LINEAR_TRAIN_VIEWS


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLoaders:
    """Opens loaders that hand this rank its part of each batch, and closes all of them at the end."""

    views: ViewConfig
    config: LoaderConfig
    batch_size: int
    """Over all ranks."""
    seed: int
    device: torch.device
    ranks: Ranks
    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _opened: list[Loader] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def center_crops(self, split: Split) -> Loader:
        """Every image once, in the order of the split, its centre cropped."""
        order = SequentialOrder(
            num_images=len(split),
            batch_size=self.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        loader = make_loader(
            split, CENTER_CROP_VIEWS, self.views, self.config, order, seed=self.seed, device=self.device
        )
        return self._kept(loader)

    def train_order(self, split: Split, *, keep_incomplete: bool = False) -> TrainOrder:
        """The shuffled order of a training. keep_incomplete: whether the last batch of an epoch may be smaller."""
        return TrainOrder(
            num_images=len(split),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            keep_incomplete=keep_incomplete,
        )

    def random_crops(self, split: Split, order: TrainOrder) -> Loader:
        """One random crop of each image, flipped at random: what classifiers are trained on."""
        loader = make_loader(
            split, LINEAR_TRAIN_VIEWS, self.views, self.config, order, seed=self.seed, device=self.device
        )
        return self._kept(loader)

    def unreadable_images(self) -> dict[str, str]:
        """Name → reason of the images that could not be read, on all ranks; others stood in for them."""
        own = {loader.split.names[index]: why for loader in self._opened for index, why in loader.unreadable.items()}
        return self.ranks.merged(own)

    def _kept(self, loader: Loader) -> Loader:
        self._opened.append(self._open.enter_context(loader))
        return loader
