"""Labelled images to learn a classifier from, and others to test it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.sources import Split, open_source
from dataset_tools.sources.layout import first_few
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited


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
    """A sentence for the user where a part of train is held out, else ""."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def describe(self) -> dict[str, Any]:
        """What a result says of its data."""
        return {
            "data": str(self.path),
            "data_kind": self.kind,
            "classes": len(self.classes),
            "train_images": len(self.train),
            "val_split": self.val.name,
            "val_images": len(self.val),
        }


def open_labelled_data(path: Path, *, holdout_seed: int, max_images: int | None = None) -> LabelledData:
    """The labelled splits of any source of images.

    holdout_seed: the run's, so that what pretraining held out is what is tested on. max_images: at most so many in
    train and in val, a class-balanced choice.
    Raises ValueError if there are no labels, if a class has no image to learn from, or if val lacks a class of train.
    """
    source = open_source(path)
    splits = choose_splits(source, holdout_seed=holdout_seed)
    if splits.bank is None or splits.queries is None:
        raise ValueError(
            f"{path} cannot be learned from: it needs labelled train images, with two or more in a class, as in "
            "train/CLASS/name.jpg"
        )
    require_every_class(splits.bank, str(path))
    require_every_class(splits.queries, str(path))
    return LabelledData(
        path=path,
        kind=source.kind,
        train=limited(splits.bank, max_images),
        val=limited(splits.queries, max_images),
        fingerprint=source.fingerprint,
        note=splits.note.replace("are kNN's queries", "are what accuracies are reported on"),
    )


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
