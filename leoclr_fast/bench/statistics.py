"""Medians with what they are worth: quantiles of a rate, and of a ratio the interval that a bootstrap gives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """NAME, the median, and NAME_q20 and NAME_q80, the 20 % and 80 % quantiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {name: statistics.median(values), f"{name}_q20": fifths[0], f"{name}_q80": fifths[3]}


def median_interval(values: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """median, low and high: the median and its 95 % bootstrap percentile interval (10,000 resamples of ``seed``).

    For ratios, give the ratio of each interleaved pair.
    """
    rng = np.random.default_rng(seed)
    sample = np.asarray(values, dtype=np.float64)
    medians = np.median(rng.choice(sample, size=(_RESAMPLES, len(sample))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(sample)), "low": float(low), "high": float(high)}


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """`median_interval` of ``above`` over ``below``, round by round."""
    return median_interval([high / low for high, low in zip(above, below, strict=True)])
