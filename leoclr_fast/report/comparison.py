"""A run beside one of the method that it is compared with: how many times as long it takes for an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from leoclr_fast.report.metrics_file import Floats
from leoclr_fast.report.run_record import RunRecord

_MIN_WINDOWS, _MAX_WINDOWS = 5, 400
_RESAMPLES = 2000


def compared_methods(runs: Sequence[RunRecord]) -> tuple[str, str] | None:
    """The first method whose baseline has a run too, and that baseline; None if there is no such pair."""
    methods = {run.method: run.method_facts.baseline for run in runs}
    return next(((method, baseline) for method, baseline in methods.items() if baseline in methods), None)


def time_ratio(run: RunRecord, baseline: RunRecord) -> tuple[float, tuple[float, float] | None]:
    """How many times as long `run` takes for an image, and an interval of it; None where too few windows were logged.

    The value is the ratio of the two overall images/s. The interval is a 95 % bootstrap percentile interval of
    (seconds / images) over (seconds / images), resampling the windows between two log records of each run: it holds
    how unevenly each run went, not what another machine or seed would do.
    """
    ours, theirs = _windows(run), _windows(baseline)
    value = _rate(baseline, theirs) / _rate(run, ours) if _rate(run, ours) > 0 else math.nan
    if min(len(ours), len(theirs)) < _MIN_WINDOWS:
        return value, None
    generator = np.random.default_rng(0)
    ratios = _resampled(ours, generator) / _resampled(theirs, generator)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return value, (float(low), float(high))


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
