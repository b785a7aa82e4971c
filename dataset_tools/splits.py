"""Which images pretraining sees, and which ones the kNN evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataset_tools.sources.split import UNLABELED, ImageSource, Split
from dataset_tools.subsets import class_balanced_order, rank_in_class

HELD_OUT = 0.1
"""Of train, where there is no other labelled split."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSplits:
    """`bank` and `queries` are labelled, disjoint, or both None; pretraining never sees the queries."""

    pretrain: Split
    bank: Split | None
    queries: Split | None
    note: str
    """A sentence for the user where something is held out or cannot be evaluated, else ""."""


def choose_splits(source: ImageSource, *, holdout_seed: int = 0) -> EvaluationSplits:
    """Pretraining: `unlabeled`, else `train`. Bank: `train`. Queries: `val`, else `test`, else a tenth of `train`.

    That tenth is class-balanced, takes at most half of any class, and is held out of pretraining and of the bank.
    Raises ValueError if there is neither train nor unlabeled.
    """
    train = source.splits.get("train")
    pretrain = source.splits.get("unlabeled", train)
    if pretrain is None:
        raise ValueError(f"{source} has neither a train nor an unlabeled split, so there is nothing to pretrain on.")
    if train is None or not _labelled(train):
        note = f"{source.path} has no labelled train images, so no kNN accuracy is computed."
        return EvaluationSplits(pretrain=pretrain, bank=None, queries=None, note=note)
    for name in ("val", "test"):
        if name in source.splits and _labelled(source.splits[name]):
            return EvaluationSplits(pretrain=pretrain, bank=train, queries=source.splits[name], note="")

    bank, held_out = hold_out(train, max(1, round(len(train) * HELD_OUT)), holdout_seed)
    if not len(held_out):
        note = f"{source.path} has no class of two images or more, so no kNN accuracy is computed."
        return EvaluationSplits(pretrain=pretrain, bank=None, queries=None, note=note)
    note = (
        f"{source.path} has no labelled val or test split: {len(held_out):,} of its {len(train):,} train "
        f"images (class-balanced, seed {holdout_seed}) are held out of pretraining and are kNN's queries."
    )
    pretrain = bank if pretrain is train else pretrain
    return EvaluationSplits(pretrain=pretrain, bank=bank, queries=held_out, note=note)


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """The rest of a labelled split, and `count` images of it that are held out.

    They are class-balanced, by the seed, and take at most half of any class: there may be fewer of them, or none.
    """
    class_sizes = np.bincount(split.labels)
    rank = rank_in_class(split.labels, seed)
    order, spare = class_balanced_order(rank, seed), rank < class_sizes[split.labels] // 2
    is_held_out = np.zeros(len(split), dtype=np.bool_)
    is_held_out[order[spare[order]][:count]] = True
    return split.subset(np.flatnonzero(~is_held_out)), split.subset(np.flatnonzero(is_held_out))


def _labelled(split: Split) -> bool:
    return len(split) > 0 and bool((split.labels != UNLABELED).all())
