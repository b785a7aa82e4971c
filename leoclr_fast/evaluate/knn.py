"""Weighted k-nearest-neighbour accuracy of frozen features (Wu, Xiong, Yu, Lin: CVPR 2018).

Legend: M queries, N images in the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
    """Accuracy of `knn_scores` against the labels: top-1 and top-5 (top-C where there are C < 5 classes)."""
    scores = knn_scores(bank, bank_labels, queries, num_classes=num_classes, k=k, temperature=temperature)
    ranked = scores.topk(min(5, num_classes), dim=1).indices.cpu()
    hits = ranked == query_labels.cpu()[:, None]
    return KnnAccuracy(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(dim=1).double().mean().item(),
        k=k,
        temperature=temperature,
    )


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Score of each class: the sum over the k nearest of exp((cosine similarity - 1) / temperature).

    The constant factor exp(-1 / temperature) changes no ranking and keeps small temperatures from overflowing.

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
        similarity, neighbour = (chunk @ bank.mT).topk(k, dim=1)
        chunk_scores.scatter_add_(1, labels[neighbour], ((similarity - 1) / temperature).exp())
    return scores
