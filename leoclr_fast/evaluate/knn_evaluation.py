"""kNN of a backbone on a data set: which images are the bank, which the queries, and the loaders over both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dataset_tools.splits import EvaluationSplits
from dataset_tools.subsets import limited
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.knn import KnnAccuracy, knn_accuracy
from leoclr_fast.evaluate.loaders import EvaluationLoaders
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnEvaluation:
    """A bank and queries, ready to be encoded by any backbone."""

    bank: Loader
    queries: Loader
    k: int
    temperature: float
    precision: str
    ranks: Ranks

    def run(self, backbone: nn.Module) -> KnnAccuracy:
        """Accuracy of the frozen backbone's features, the same on every rank."""
        bank, bank_labels = extract_features(backbone, self.bank, self.precision, self.ranks)
        queries, query_labels = extract_features(backbone, self.queries, self.precision, self.ranks)
        return knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            num_classes=len(self.bank.split.classes),
            k=self.k,
            temperature=self.temperature,
        )


@contextmanager
def knn_evaluation(
    splits: EvaluationSplits,
    *,
    views: ViewConfig,
    loader: LoaderConfig,
    batch_size: int,
    k: int,
    temperature: float,
    precision: str,
    device: torch.device,
    ranks: Ranks,
    max_images: int | None = None,
) -> Iterator[KnnEvaluation | None]:
    """Loaders over the splits' bank and queries; None where the data has no labels.

    max_images: at most so many in the bank and in the queries each, a class-balanced choice.
    Raises ValueError if the bank has fewer than k images.
    """
    if splits.bank is None or splits.queries is None:
        yield None
        return
    bank, queries = limited(splits.bank, max_images), limited(splits.queries, max_images)
    if k > len(bank):
        raise ValueError(
            f"kNN with k = {k} needs at least as many labelled images, but the bank has {len(bank)}; "
            "lower --k, or --monitor.knn-k in pretrain"
        )
    with EvaluationLoaders(
        views=views, config=loader, batch_size=batch_size, seed=0, device=device, ranks=ranks
    ) as loaders:
        yield KnnEvaluation(
            bank=loaders.center_crops(bank),
            queries=loaders.center_crops(queries),
            k=k,
            temperature=temperature,
            precision=precision,
            ranks=ranks,
        )
