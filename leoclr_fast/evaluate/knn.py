"""Weighted k-nearest-neighbour accuracy of frozen features (Wu, Xiong, Yu, Lin: CVPR 2018): `leoclr-fast knn`.

Legend: M queries, N images in the bank, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dataset_tools.sources import Split
from leoclr_fast.config import MonitorConfig
from leoclr_fast.evaluate.accuracy import Accuracy, accuracy
from leoclr_fast.evaluate.data import EvaluationLoaders, open_labelled_data
from leoclr_fast.evaluate.evaluation import evaluation_of
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.protocols import KnnProtocol, ViewOptions

_CHUNK_SIMILARITIES = 1 << 26


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Score of each class: the sum over its images among the k nearest of exp((similarity - largest) / temperature).

    similarity: cosine; largest: of the nearest image. That factor changes no ranking, and neither large nor small
    temperatures make all weights infinite or zero. A class without a vote, however faint, is no prediction: -inf.

    bank [N, D], N >= k, and queries [M, D]: unit rows on one device; bank_labels: int64 [N]. Returns [M, num_classes].
    """
    labels = bank_labels.to(bank.device)
    scores = bank.new_zeros(len(queries), num_classes)
    rows = max(1, _CHUNK_SIMILARITIES // len(bank))
    for chunk, chunk_scores in zip(queries.split(rows), scores.split(rows), strict=True):
        similarity, neighbour = (chunk @ bank.mT).topk(k, dim=1)  # the nearest first
        votes = ((similarity - similarity[:, :1]) / temperature).exp().clamp_min(torch.finfo(bank.dtype).tiny)
        chunk_scores.scatter_add_(1, labels[neighbour], votes)
    return scores.masked_fill_(scores == 0, -torch.inf)


class KnnEvaluation:
    """A bank and queries, ready to be encoded by any backbone."""

    def __init__(
        self, bank: Split, queries: Split, loaders: EvaluationLoaders, *, k: int, temperature: float, precision: str
    ) -> None:
        """Raises ValueError if the bank has fewer than k images."""
        if k > len(bank):
            raise ValueError(
                f"kNN with k = {k} needs at least as many labelled images, but the bank has {len(bank)}; "
                "lower --k, or --monitor.knn-k in pretrain"
            )
        self.bank, self.queries = loaders.center_crops(bank), loaders.center_crops(queries)
        self.k, self.temperature, self._precision, self._ranks = k, temperature, precision, loaders.ranks

    def run(self, backbone: nn.Module, go_on: Callable[[], None] = lambda: None) -> Accuracy:
        """Accuracy of the frozen backbone's features, the same on every rank. go_on: as of `extract_features`."""
        features = partial(extract_features, backbone, precision=self._precision, ranks=self._ranks, go_on=go_on)
        bank, bank_labels = features(self.bank, what="kNN features of the bank")
        queries, labels = features(self.queries, what="kNN features of the queries")
        classes = len(self.bank.split.classes)
        scores = knn_scores(bank, bank_labels, queries, num_classes=classes, k=self.k, temperature=self.temperature)
        return accuracy(scores, labels)


def run(
    weights: Path, data: Path, protocol: KnnProtocol, options: ViewOptions, *, console: Console | None = None
) -> dict[str, Any]:
    """kNN of a run's final weights, else of its newest checkpoint, or of a file of weights.

    Returns top1 and top5 (percent), k, temperature, bank_images, query_images, note, and as `Evaluation.result`. k and
    temperature default to the run's own, for a file to those of MoCo's CIFAR demo.
    Raises ValueError for what the user can mend.
    """
    with evaluation_of(weights, options, console) as evaluation:
        pretrained, options = evaluation.pretrained, evaluation.options
        monitor = pretrained.run.read_config().monitor if pretrained.run else MonitorConfig()
        k, temperature = protocol.k or monitor.knn_k, protocol.temperature or monitor.knn_temperature
        labelled = open_labelled_data(
            data, holdout_seed=pretrained.holdout_seed, max_images=options.max_images, every_class=False
        )
        bank, queries = labelled.train, labelled.val

        def compute(_: Path) -> dict[str, Any]:
            with evaluation.loaders(bank, protocol.batch_size, seed=0) as loaders:
                knn = KnnEvaluation(bank, queries, loaders, k=k, temperature=temperature, precision=options.precision)
                found = knn.run(evaluation.frozen_backbone())
            return {
                "top1": found.top1,
                "top5": found.top5,
                "k": k,
                "temperature": temperature,
                "bank_images": len(bank),
                "query_images": len(queries),
                "note": labelled.note,
                "data": str(data),
                "data_kind": labelled.kind,
            }

        settings = {"k": k, "temperature": temperature, "features": "backbone"}
        return evaluation.result("knn", settings | evaluation.view_settings(labelled.fingerprint), compute)
