"""Reference curves: what runs of ours did, from committed logs. Where there is no log, there is no curve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from leoclr_fast.config_file import differing_fields
from leoclr_fast.report.metrics_file import Floats
from leoclr_fast.report.run_record import RunRecord

REFERENCE_FILE = Path(__file__).with_name("reference_curves.json")
"""Written by `python -m benchmarks.reference_curves`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The curves of one recipe over some seeds; each is [N, 4]: x, mean, lowest, highest."""

    spread: str
    """What the mean and the band are over."""
    source: str
    """What was run where, and the file that says so."""
    knn_top1: Floats
    """x is the epoch."""
    loss: Floats
    """x is the step. A record is a mean over the steps since the one before it."""


def comparable_settings(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain result configuration that must be the same for a curve to be expected: all but the seed."""
    return {key: value for key, value in result.items() if key != "seed"}


def find_reference(run: RunRecord) -> tuple[Reference | None, str]:
    """The reference of a run and where it comes from; or None and the reason why none is drawn."""
    settings = run.setting("result")
    own = [entry for entry in _entries() if entry["recipe"] == run.recipe]
    if run.synthetic:
        return None, "No expected curve: this run learned from noise, to measure speed."
    if not own or not settings:
        return None, f"No expected curve: no run of {run.recipe} is among our committed logs yet."
    reasons = []
    for entry in own:
        differences = differing_fields(entry["settings"], comparable_settings(settings))
        images, world_size = run.data.images, run.environment.world_size
        if images != entry["images"]:
            differences.append(f"images: {entry['images']:,} there, {'?' if images is None else f'{images:,}'} here")
        if world_size != entry["world_size"]:
            differences.append(f"ranks: {entry['world_size']} there, {world_size} here")
        if not differences:
            return _reference(entry), ""
        shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
        reasons.append(f"our log of {run.recipe} ({entry['source']}) has other settings: {shown}")
    return None, f"No expected curve: {' and '.join(reasons)}."


def _reference(entry: dict[str, Any]) -> Reference:
    seeds = len(entry["seeds"])
    many = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    commits = ", ".join(commit[:12] for commit in entry["commits"])
    return Reference(
        spread=many,
        source=(
            f"{many} of {entry['recipe']} on {entry['data']}, {entry['images']:,} images, run by us at commit "
            f"{commits}; log: {entry['source']}. First command: {entry['commands'][0]}"
        ),
        knn_top1=np.array(entry["knn_top1"], dtype=np.float64),
        loss=np.array(entry["loss"], dtype=np.float64),
    )


@cache
def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(REFERENCE_FILE.read_text())
    return entries
