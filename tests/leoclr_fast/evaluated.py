"""A tiny pretrained run, and evaluations of copies of it on a command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from leoclr_fast.cli import run_command
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.run import stepper
from leoclr_fast.run.checkpoint import save_checkpoint
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.stepper import Stepper
from leoclr_fast.run.telemetry import ProgressDisplay
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


class Killed(BaseException):
    """As a kill: nothing in the program catches it."""


@contextmanager
def killed(after: int) -> Iterator[list[int]]:
    """What is done here dies when so many checkpoints are on the disk; their steps."""
    saved: list[int] = []

    def dying(folder: Path, step: int, *given: Any) -> None:
        save_checkpoint(folder, step, *given)
        saved.append(step)
        if len(saved) == after:
            raise Killed

    with patch.object(stepper, "save_checkpoint", dying), pytest.raises(Killed):
        yield saved


def steps_of(folder: Path, total_steps: int, ranks: Ranks = Ranks()) -> tuple[Stepper, ProgressDisplay]:  # noqa: B008
    """The steps of a training on the CPU, of which only the end is saved, and a display that shows nothing."""
    steps = Stepper(folder, total_steps=total_steps, ranks=ranks, save_every_steps=total_steps)
    return steps, ProgressDisplay(Console(quiet=True), total_steps, enabled=False)


def kept_results(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl."""
    file = RunFolder(run).evaluations_file
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
