"""Weighted k-nearest-neighbour accuracy of frozen features (Wu, Xiong, Yu, Lin: CVPR 2018): `leoclr-fast knn`.

Legend: M queries, N images in the bank, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dataset_tools.sources import open_source
from dataset_tools.splits import EvaluationSplits, choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.config import MonitorConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.evaluation import (
    Result,
    evaluation_ranks,
    evaluation_views,
    open_evaluation,
    require_real_images,
)
from leoclr_fast.evaluate.features import extract_features
from leoclr_fast.evaluate.protocols import KnnOptions, KnnProtocol
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.weights.pretrained import load_pretrained
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.loader import Loader

_CHUNK_SIMILARITIES = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnAccuracy:
    """Accuracies in percent, beside the two values they depend on."""

    top1: float
    top5: float
    k: int
    temperature: float


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
) -> KnnAccuracy:
    """Accuracy of `knn_scores` against the labels: top-1 and top-5. A class without a vote is no prediction, so that
    fewer than five may come into question.
    """
    scores = knn_scores(bank, bank_labels, queries, num_classes=num_classes, k=k, temperature=temperature)
    best, ranked = scores.topk(min(5, num_classes), dim=1)
    hits = ((ranked == query_labels.to(ranked.device)[:, None]) & (best > 0)).cpu()
    return KnnAccuracy(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(dim=1).double().mean().item(),
        k=k,
        temperature=temperature,
    )


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Score of each class: the sum over its images among the k nearest of exp((similarity - largest) / temperature).

    similarity: cosine; largest: of the nearest image. That factor changes no ranking, and neither large nor small
    temperatures make all weights infinite or zero. A class has a score above 0 if it has a vote, however faint.

    bank [N, D] and queries [M, D]: unit rows on one device; bank_labels: int64 [N]. Returns [M, num_classes].
    Raises ValueError if the bank has fewer than k images, k < 1 or temperature <= 0.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"kNN with k = {k} and temperature {temperature:g} is not allowed: give k >= 1, temperature > 0"
        )
    if k > len(bank):
        raise ValueError(f"kNN with k = {k} needs at least as many images, but the bank has {len(bank)}; lower k")
    labels = bank_labels.to(bank.device)
    scores = bank.new_zeros(len(queries), num_classes)
    rows = max(1, _CHUNK_SIMILARITIES // len(bank))
    for chunk, chunk_scores in zip(queries.split(rows), scores.split(rows), strict=True):
        similarity, neighbour = (chunk @ bank.mT).topk(k, dim=1)  # the nearest first
        votes = ((similarity - similarity[:, :1]) / temperature).exp().clamp_min(torch.finfo(bank.dtype).tiny)
        chunk_scores.scatter_add_(1, labels[neighbour], votes)
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnEvaluation:
    """A bank and queries, ready to be encoded by any backbone."""

    bank: Loader
    queries: Loader
    k: int
    temperature: float
    precision: str
    ranks: Ranks

    def run(self, backbone: nn.Module, go_on: Callable[[], None] = lambda: None) -> KnnAccuracy:
        """Accuracy of the frozen backbone's features, the same on every rank. go_on: as of `extract_features`."""
        features = partial(extract_features, backbone, precision=self.precision, ranks=self.ranks, go_on=go_on)
        bank, bank_labels = features(self.bank, what="kNN features of the bank")
        queries, query_labels = features(self.queries, what="kNN features of the queries")
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
    max_queries: int | None = None,
) -> Iterator[KnnEvaluation | None]:
    """Loaders over the splits' bank and queries; None where the data has no labels.

    max_images: at most so many in the bank and in the queries each, a class-balanced choice. max_queries: further.
    Raises ValueError if the bank has fewer than k images.
    """
    if splits.bank is None or splits.queries is None:
        yield None
        return
    bank, queries = limited(splits.bank, max_images), limited(splits.queries, max_queries or max_images)
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


def run(
    weights: Path, data: Path, protocol: KnnProtocol, options: KnnOptions, *, console: Console | None = None
) -> Result:
    """kNN of a run's final weights, else of its newest checkpoint, or of a file of weights.

    Returns top1 and top5 (percent; None without labels), k, temperature, weights and their checksum, bank_images,
    query_images, note. k and temperature default to the run's own, for a file to those of MoCo's CIFAR demo.
    Raises ValueError for what the user can mend.
    """
    require_real_images(options.loader)
    with evaluation_ranks(options) as (options, ranks, device):
        pretrained = load_pretrained(weights, untrained=options.untrained)
        monitor = pretrained.run.read_config().monitor if pretrained.run else MonitorConfig()
        k = monitor.knn_k if protocol.k is None else protocol.k
        temperature = monitor.knn_temperature if protocol.temperature is None else protocol.temperature
        backbone = pretrained.backbone.to(device, encoder_dtype(options.precision))
        source = open_source(data)
        splits = choose_splits(source, holdout_seed=pretrained.holdout_seed)
        views = evaluation_views(pretrained, image_size=options.image_size)
        settings = {
            "k": k,
            "temperature": temperature,
            "features": "backbone",
            "image_size": views.image_size,
            "center_crop_fraction": views.center_crop_fraction,
            "precision": options.precision,
            "data_fingerprint": source.fingerprint,
            "max_images": options.max_images,
        }

        def compute() -> dict[str, Any]:
            with knn_evaluation(
                splits,
                views=views,
                loader=options.loader,
                batch_size=protocol.batch_size,
                k=k,
                temperature=temperature,
                precision=options.precision,
                device=device,
                ranks=ranks,
                max_images=options.max_images,
            ) as evaluation:
                assert evaluation is not None
                return {
                    **asdict(evaluation.run(backbone.to(memory_format=torch.channels_last))),
                    **pretrained.describe(),
                    "bank_images": len(evaluation.bank.split),
                    "query_images": len(evaluation.queries.split),
                    "note": splits.note,
                    "data": str(data),
                    "data_kind": source.kind,
                }

        if splits.queries is None:
            nothing = {"top1": None, "top5": None, "k": k, "temperature": temperature, "note": splits.note}
            return Result("knn", nothing if ranks.is_main else {})
        if options.out is not None:
            with open_evaluation("knn", settings, pretrained, ranks, device, options) as evaluation:
                return evaluation.result(compute)
        values = compute() | {"settings": settings}
        if not ranks.is_main:
            return Result("knn", {})
        if pretrained.run is not None:
            pretrained.run.add_evaluation("knn", values)
        return Result("knn", values)
