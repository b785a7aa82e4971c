"""Runs of our method beside runs of the baseline: pairs, the ratio of their speeds, and what else differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leoclr_fast.config_file import differences
from leoclr_fast.report.metrics_file import Floats
from leoclr_fast.report.run_record import RunRecord

_MIN_WINDOWS, _MAX_WINDOWS = 5, 400
_RESAMPLES = 2000
_METHOD_FIELDS = {"recipe", "result.method.name"}
_CIRCUMSTANCES = ("device", "gpu", "cpu", "torch_threads", "world_size", "git_commit", "versions.torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Time per image of a run over that of its baseline; the interval is None where too few windows were logged."""

    value: float
    interval: tuple[float, float] | None
    windows: tuple[int, int]

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "unknown"
        if self.interval is None:
            return f"{self.value:.3f} (no interval: {min(self.windows)} stretches are too few)"
        return f"{self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A run and the one of the baseline whose configuration is nearest to it."""

    run: RunRecord
    baseline: RunRecord
    gain: float
    """kNN top-1, points; NaN if one of them has none."""
    time_ratio: Ratio
    differences: list[str]
    """Settings and circumstances, other than the method, in which the two differ: a fair comparison has none."""


def compared_methods(runs: Sequence[RunRecord]) -> tuple[str, str] | None:
    """The first method whose baseline has a run too, and that baseline; None if there is no such pair."""
    methods = {run.method: run.method_facts.baseline for run in runs}
    return next(((method, baseline) for method, baseline in methods.items() if baseline in methods), None)


def find_pairs(runs: list[RunRecord]) -> list[Pair]:
    """Each run of a method beside the nearest one of its baseline; empty if there is no such pair of methods."""
    compared = compared_methods(runs)
    if compared is None:
        return []
    pairs = []
    for run in (run for run in runs if run.method == compared[0]):
        others = {other: other_differences([run, other]) for other in runs if other.method == compared[1]}
        nearest = min(others, key=lambda other: len(others[other]))
        pairs.append(
            Pair(
                run=run,
                baseline=nearest,
                gain=run.knn_top1 - nearest.knn_top1,
                time_ratio=time_ratio(run, nearest),
                differences=others[nearest],
            )
        )
    return pairs


def time_ratio(run: RunRecord, baseline: RunRecord) -> Ratio:
    """How many times as long `run` takes for an image.

    The value is the ratio of the two overall images/s. The interval is a 95 % bootstrap percentile interval of
    (seconds / images) over (seconds / images), resampling the windows between two log records of each run: it holds
    how unevenly each run went, not what another machine or seed would do.
    """
    ours, theirs = _windows(run), _windows(baseline)
    value = _rate(baseline, theirs) / _rate(run, ours) if _rate(run, ours) > 0 else math.nan
    counts = (len(ours), len(theirs))
    if min(counts) < _MIN_WINDOWS:
        return Ratio(value=value, interval=None, windows=counts)
    generator = np.random.default_rng(0)
    ratios = _resampled(ours, generator) / _resampled(theirs, generator)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(value=value, interval=(float(low), float(high)), windows=counts)


def speed_range(run: RunRecord) -> tuple[float, float]:
    """Images/s that a fifth of the windows stayed below, and that a fifth exceeded; NaN if none was logged."""
    windows = _windows(run)
    if not len(windows):
        return math.nan, math.nan
    slow, fast = np.percentile(windows[:, 1] / windows[:, 0], [20, 80])
    return float(slow), float(fast)


def differing_environment(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """As `differences`, of what the runs were made on and with, and of their data."""
    return differences(
        [
            {"data": {"fingerprint": run.data.fingerprint, "images": run.data.images}, **run.environment.as_plain()}
            for run in runs
        ]
    )


def other_differences(runs: list[RunRecord]) -> list[str]:
    """What differs between runs of different methods, and is not the method."""
    settings = [name for name in differences([run.config for run in runs]) if name not in _METHOD_FIELDS]
    shown = (*_CIRCUMSTANCES, "data.fingerprint", "data.images")
    return settings + [name for name in differing_environment(runs) if name in shown]


def _rate(run: RunRecord, windows: Floats) -> float:
    """Images/s of training: what the run says of itself, or over all its starts where it was started more than once."""
    if len(run.metrics.starts) > 1 and len(windows):
        return float(windows[:, 1].sum() / windows[:, 0].sum())
    return run.images_per_s


def _windows(run: RunRecord) -> Floats:
    """[N, 2]: training seconds and images between two log records; neighbours are merged where there are many."""
    windows = run.windows
    rows = np.stack([windows.seconds, windows.images], axis=1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) > _MAX_WINDOWS:
        starts = np.linspace(0, len(rows), _MAX_WINDOWS, endpoint=False).astype(np.int64)
        rows = np.add.reduceat(rows, starts)
    return rows


def _resampled(windows: Floats, generator: np.random.Generator) -> Floats:
    """Seconds per image of each resample."""
    chosen = generator.integers(len(windows), size=(_RESAMPLES, len(windows)))
    seconds, images = windows[:, 0][chosen].sum(axis=1), windows[:, 1][chosen].sum(axis=1)
    return seconds / images
