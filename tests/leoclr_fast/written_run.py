"""Run folders written by hand: what a run leaves behind, without the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leoclr_fast.config import RunConfig
from leoclr_fast.recipes import get_recipe
from leoclr_fast.run.folder import RunFolder

STEPS_PER_EPOCH = 46
START_UNIX_S = 1_700_000_000.0


def start(step: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "kind": "start", "step": step, "format": 1, "steps_per_epoch": STEPS_PER_EPOCH, "world_size": 1,
        "boot_id": "another machine's", "unix_s": START_UNIX_S + step, **values,
    }  # fmt: skip


def end(step: int, status: str, **values: Any) -> dict[str, Any]:
    return {"kind": "end", "step": step, "status": status, "unix_s": START_UNIX_S + step + 1, **values}


def step_record(step: int, **values: Any) -> dict[str, Any]:
    """A second a step, 64 images/s, 5 % of the time waiting for data."""
    return {
        "kind": "step", "step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "loss": 5 + step / 1000,
        "positive_similarity": 0.5, "negative_similarity": 0.1, "gradient_norm": 1.0, "lr": 0.03,
        "images_per_s": 64.0, "data_wait_fraction": 0.05, "unix_s": START_UNIX_S + step, **values,
    }  # fmt: skip


def knn(step: int, top1: float) -> dict[str, Any]:
    return {
        "kind": "knn", "step": step, "epoch": step / STEPS_PER_EPOCH, "top1": top1, "top5": top1 + 20, "k": 20,
        "temperature": 0.1, "unix_s": START_UNIX_S + step,
    }  # fmt: skip


def written_run(
    path: Path, records: Iterable[dict[str, Any]], *, config: RunConfig | None = None, tail: str = "", **files: Any
) -> Path:
    """A run folder with these records; `tail` is appended as it is; summary=…, environment=…, data=… become JSON."""
    folder = RunFolder(path)
    folder.create()
    folder.write_config(config or get_recipe("leoclr_demo"))
    folder.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    for name, document in files.items():
        (path / f"{name}.json").write_text(json.dumps(document))
    return path
