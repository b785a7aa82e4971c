"""LeOCLR beside MoCo-v2: pairs of runs, the ratio of their speeds with an interval, and what else differs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from leoclr_fast.report.metrics_file import Floats
from leoclr_fast.report.reproduce import flat
from leoclr_fast.report.run_record import RunRecord

_MIN_WINDOWS, _MAX_WINDOWS = 5, 400
_RESAMPLES = 2000
_METHOD_FIELDS = {"recipe", "result.method.name"}
_ENVIRONMENT_FIELDS = ("device", "gpu", "cpu", "torch_threads", "world_size", "git_commit", "versions.torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Time per image of LeOCLR over that of MoCo-v2; the interval is None where too few windows were logged."""

    value: float
    low: float | None
    high: float | None
    windows: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A LeOCLR run and the MoCo-v2 run whose configuration is nearest to it."""

    leoclr: RunRecord
    mocov2: RunRecord
    gain: float
    """kNN top-1, points; NaN if one of them has none."""
    time_ratio: Ratio
    differences: list[str]
    """Settings and circumstances, other than the method, in which the two differ: a fair comparison has none."""


def find_pairs(runs: list[RunRecord]) -> list[Pair]:
    """Each LeOCLR run beside its nearest MoCo-v2 run; empty if there is only one method."""
    partners = [run for run in runs if run.method == "mocov2"]
    if not partners:
        return []
    pairs = []
    for run in (run for run in runs if run.method == "leoclr"):
        partner = min(partners, key=lambda other: len(other_differences([run, other])))
        pairs.append(
            Pair(
                leoclr=run,
                mocov2=partner,
                gain=run.knn_top1 - partner.knn_top1,
                time_ratio=time_ratio(run, partner),
                differences=other_differences([run, partner]),
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
        return Ratio(value=value, low=None, high=None, windows=counts)
    generator = np.random.default_rng(0)
    ratios = _resampled(ours, generator) / _resampled(theirs, generator)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(value=value, low=float(low), high=float(high), windows=counts)


def speed_range(run: RunRecord) -> tuple[float, float]:
    """Images/s that a fifth of the windows stayed below, and that a fifth exceeded; NaN if none was logged."""
    windows = _windows(run)
    if not len(windows):
        return math.nan, math.nan
    slow, fast = np.percentile(windows[:, 1] / windows[:, 0], [20, 80])
    return float(slow), float(fast)


def differing_settings(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Dotted name → its value in each run, where they are not all equal; a missing value is None."""
    flats = [flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for values in flats for name in values))
    rows = {name: [values.get(name) for values in flats] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values[1:])}


def differing_environment(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """As `differing_settings`, of what the runs were made on and with, and of their data."""
    flats = [
        flat({"data": {key: run.data.get(key) for key in ("fingerprint", "images")}, **run.environment}) for run in runs
    ]
    names = list(dict.fromkeys(name for values in flats for name in values))
    rows = {name: [values.get(name) for values in flats] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values[1:])}


def other_differences(runs: list[RunRecord]) -> list[str]:
    """What differs between runs of different methods, and is not the method."""
    settings = [name for name in differing_settings(runs) if name not in _METHOD_FIELDS]
    shown = (*_ENVIRONMENT_FIELDS, "data.fingerprint", "data.images")
    return settings + [name for name in differing_environment(runs) if name in shown]


def _rate(run: RunRecord, windows: Floats) -> float:
    """Images/s of training: what the run says of itself, or over all its starts where it was started more than once."""
    if len(run.metrics.starts) > 1 and len(windows):
        return float(windows[:, 1].sum() / windows[:, 0].sum())
    return run.images_per_s


def _windows(run: RunRecord) -> Floats:
    """[N, 2]: training seconds and images between two log records; neighbours are merged where there are many."""
    rows = np.stack([run.window_seconds, run.window_images], axis=1) if run.metrics.num_steps_kept else np.empty((0, 2))
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
