"""The images of an evaluation: labelled ones to learn from, others to test on, and the loaders over both."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset_tools.sources import Split, open_source
from dataset_tools.sources.layout import first_few
from dataset_tools.splits import choose_splits, hold_out
from dataset_tools.subsets import limited
from leoclr_fast.distributed.collectives import Ranks
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import SequentialOrder, TrainOrder
from pipelines.views import CENTER_CROP_VIEWS, LINEAR_TRAIN_VIEWS

_MAX_HELD_OUT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledData:
    """Disjoint `train` and `val`, with one class list."""

    path: Path
    kind: str
    """What was recognised: "CIFAR-10", "image folder", …."""
    train: Split
    val: Split
    """What accuracies are reported on: the source's val, else its test, else a part of train that is held out."""
    fingerprint: str
    """Of the whole source: SHA-256 over names and labels."""
    note: str
    """For the user, where something is missing, held out, or not as published, else ""."""

    def describe(self) -> dict[str, Any]:
        """The fields of a result about its data."""
        return {
            "data": str(self.path),
            "data_kind": self.kind,
            "classes": len(self.train.classes),
            "train_images": len(self.train),
            "val_split": self.val.name,
            "val_images": len(self.val),
            "note": self.note,
        }


def open_labelled_data(
    path: Path, *, holdout_seed: int, max_images: int | None = None, every_class: bool = True
) -> LabelledData:
    """The labelled splits of any source of images.

    holdout_seed: the run's, so that what pretraining held out is what is tested on. max_images: at most so many in
    train and in val, a class-balanced choice. every_class: whether train has to have images of each; val need not.
    Raises ValueError if there are no labels, or if a class lacks an image that it has to have.
    """
    source = open_source(path)
    splits = choose_splits(source, holdout_seed=holdout_seed)
    if splits.bank is None or splits.queries is None:
        raise ValueError(
            f"{path} cannot be learned from: it needs labelled train images, with two or more in a class, as in "
            "train/CLASS/name.jpg"
        )
    if every_class:
        require_every_class(splits.bank, str(path))
    held_out = splits.note.replace("are kNN's queries", "are what accuracies are reported on")
    return LabelledData(
        path=path,
        kind=source.kind,
        train=limited(splits.bank, max_images),
        val=limited(splits.queries, max_images),
        fingerprint=source.fingerprint,
        note=" ".join(filter(None, (held_out, lacking(splits.bank), lacking(splits.queries)))),
    )


def lacking(split: Split) -> str:
    """A sentence on the classes that have no image in a split to test on, or ""."""
    absent = len(split.classes) - len(np.unique(split.labels))
    return f"{split.name} has no image of {absent:,} of the {len(split.classes):,} classes." if absent else ""


def require_every_class(
    split: Split, where: str, remedy: str = "Add images of them, or take these classes out of all splits."
) -> None:
    """Raises ValueError if a class has no image in `split`, or an image no class. remedy: what the user can do."""
    counts = np.bincount(split.labels[split.labels >= 0], minlength=len(split.classes))
    unlabelled = int((split.labels < 0).sum())
    if unlabelled:
        raise ValueError(f"{unlabelled:,} images of {split.name} in {where} have no label")
    empty = [name for name, count in zip(split.classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{split.name} in {where} has no image of {len(empty):,} of the {len(split.classes):,} classes: "
            f"{first_few(empty)}. {remedy}"
        )


def hold_out_to_choose(train: Split, seed: int) -> tuple[Split, Split]:
    """The rest of train, and a tenth of it, at most 10,000 images, by which settings are chosen.

    Raises ValueError if no image can be held out.
    """
    rest, held_out = hold_out(train, min(_MAX_HELD_OUT, max(1, len(train) // 10)), seed)
    if not len(held_out):
        raise ValueError(
            "no class has two images or more, so none can be held out to choose among settings with; give a single "
            "learning rate instead of a grid"
        )
    return rest, held_out


class EvaluationLoaders(ExitStack):
    """Opens loaders that hand this rank its part of each batch, and closes all of them at the end."""

    def __init__(
        self, views: ViewConfig, config: LoaderConfig, batch_size: int, seed: int, device: torch.device, ranks: Ranks
    ) -> None:
        """batch_size: over all ranks."""
        super().__init__()
        self.ranks = ranks
        self._views, self._config, self._batch_size, self._seed, self._device = views, config, batch_size, seed, device
        self._loaders: list[Loader] = []

    def center_crops(self, split: Split) -> Loader:
        """Every image once, in the order of the split, its centre cropped."""
        order = SequentialOrder(
            num_images=len(split),
            batch_size=self._batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        return self._loader(split, CENTER_CROP_VIEWS, order)

    def random_crops(self, split: Split, order: TrainOrder) -> Loader:
        """One random crop of each image, flipped at random: what classifiers are trained on."""
        return self._loader(split, LINEAR_TRAIN_VIEWS, order)

    def train_order(self, split: Split, *, keep_incomplete: bool = False) -> TrainOrder:
        """The shuffled order of a training. keep_incomplete: whether the last batch of an epoch may be smaller."""
        return TrainOrder(
            num_images=len(split),
            batch_size=self._batch_size,
            seed=self._seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            keep_incomplete=keep_incomplete,
        )

    def unreadable_images(self) -> dict[str, str]:
        """Name → reason of the images that could not be read, on all ranks; others stood in for them."""
        own = {loader.split.names[index]: why for loader in self._loaders for index, why in loader.unreadable.items()}
        return self.ranks.merged(own)

    def _loader(self, split: Split, views: Any, order: SequentialOrder | TrainOrder) -> Loader:
        loader = make_loader(split, views, self._views, self._config, order, seed=self._seed, device=self._device)
        self._loaders.append(self.enter_context(loader))
        return loader
