"""A simple model of step time over ranks, fitted to measured points, and what it projects. Projections, not timings.

step(n) = fixed + per_image * images of a rank + latency * collectives * ceil(log2 n) + wire bytes / bandwidth
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

FORMULA = (
    "step(n) = fixed + per_image x images of a rank + latency x collectives x ceil(log2 n) + wire bytes / bandwidth; "
    "wire bytes of a rank are 2 (n - 1)/n of what is summed and (n - 1)/n of what is gathered or exchanged"
)
_TERMS = ("fixed_ms", "per_image_ms", "latency_ms", "ms_per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint:
    """A number of ranks and what a step on it does; step_ms where it was measured."""

    num_ranks: int
    local_batch_size: int
    """Images of the first rank, which has the most."""
    num_collectives: int
    wire_bytes: float
    step_ms: float | None = None

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """What the coefficients of the model are multiplied by."""
        hops = math.ceil(math.log2(self.num_ranks))
        return (1.0, self.local_batch_size, self.num_collectives * hops, self.wire_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingModel:
    """Coefficients, none negative. Where all points had the same images per rank, `fixed_ms` is the whole computation
    and `per_image_ms` is None: the model is for that number of images alone."""

    fixed_ms: float
    per_image_ms: float | None
    latency_ms: float
    """Of a collective, for each doubling of the ranks."""
    ms_per_byte: float
    worst_error: float
    """The largest relative difference between the model and a point that it was fitted to."""

    @property
    def bandwidth_gb_per_s(self) -> float | None:
        """1e9 bytes a second, that a rank sends; None if the bytes were seen to cost nothing."""
        return 1e-6 / self.ms_per_byte if self.ms_per_byte > 0 else None

    def step_ms(self, point: ScalingPoint) -> float:
        """The projected time of a step."""
        fixed, images, hops, sent = point.terms
        compute = fixed * self.fixed_ms + images * (self.per_image_ms or 0.0)
        return compute + hops * self.latency_ms + sent * self.ms_per_byte


def fit_scaling_model(points: Sequence[ScalingPoint]) -> ScalingModel:
    """Least squares of the relative errors, with no coefficient below zero.

    Raises ValueError for fewer points than coefficients and one, or for points that cannot tell them apart: a line
    through two points says nothing of a third.
    """
    same_images = len({point.local_batch_size for point in points}) < 2
    names = [name for name in _TERMS if not (same_images and name == "per_image_ms")]
    columns = [_TERMS.index(name) for name in names]
    terms = np.array([point.terms for point in points], dtype=np.float64).reshape(len(points), len(_TERMS))[:, columns]
    measured = np.array([point.step_ms for point in points], dtype=np.float64)
    if len(points) <= len(names):
        raise ValueError(
            f"{len(points)} measured points are too few to fit {len(names)} coefficients; give more --ranks, or "
            "--mode both"
        )
    relative = terms / measured[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), np.finfo(np.float64).tiny)
    if np.linalg.matrix_rank(relative / scale) < len(names):
        raise ValueError("the measured points cannot tell latency, bandwidth and computation apart; give other --ranks")
    solution = _non_negative_least_squares(relative / scale, np.ones(len(points))) / scale
    values = dict(zip(names, solution.tolist(), strict=True))
    return ScalingModel(
        fixed_ms=values["fixed_ms"],
        per_image_ms=values.get("per_image_ms"),
        latency_ms=values["latency_ms"],
        ms_per_byte=values["ms_per_byte"],
        worst_error=float(np.abs(relative @ solution - 1).max()),
    )


def _non_negative_least_squares(
    matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The best of all solutions in which some coefficients are zero and the others are positive: few enough to try."""
    num_terms = matrix.shape[1]
    best, least = np.zeros(num_terms), float(np.square(target).sum())
    for count in range(1, num_terms + 1):
        for chosen in combinations(range(num_terms), count):
            values = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ values - target).sum())
            if (values >= 0).all() and error < least:
                best, least = np.zeros(num_terms), error
                best[list(chosen)] = values
    return best


def projected_row(model: ScalingModel, mode: str, batch_size: int, point: ScalingPoint) -> dict[str, Any]:
    """mode, ranks, batch_size, step_ms and images_per_s that the model gives a point that was not measured."""
    step_ms = model.step_ms(point)
    return {
        "mode": mode,
        "ranks": point.num_ranks,
        "batch_size": batch_size,
        "step_ms": step_ms,
        "images_per_s": 1000 * batch_size / step_ms,
    }
