"""A tiny pretrained run, and evaluations of copies of it on a command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from leoclr_fast.cli import run_command
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config


def pretrained_run(out: Path, data: Path, method: str = "leoclr", **changes: Any) -> Path:
    """A run of one epoch, in float32."""
    pretrain(tiny_config(method, **{"result__epochs": 1, "speed__precision": "fp32", **changes}), data, out)
    return out


def copy_of(run: Path, folder: Path) -> Path:
    """A run folder of its own, without what was evaluated in the other."""
    copy = folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluations*", ".lock"))
    return copy


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    code = run_command([*map(str, arguments), "--device=cpu", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured
    document: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return document


def kept_results(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl."""
    file = RunFolder(run).evaluations_file
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
