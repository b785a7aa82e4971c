"""Trainings of evaluations: their steps, their death, their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.run import stepper
from leoclr_fast.run.checkpoint import save_checkpoint
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.stepper import Stepper


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


def steps_of(folder: Path, total_steps: int, ranks: Ranks = Ranks()) -> Stepper:  # noqa: B008
    """The steps of a training of which only the end is saved."""
    return Stepper(folder, total_steps=total_steps, ranks=ranks, save_every_steps=total_steps)


def same_files(name: str, *folders: Path) -> bool:
    """Whether two evaluations left the same there, bit by bit: equal tensors make equal files."""
    one, two = ((folder / name).read_bytes() for folder in folders)
    return one == two


def kept_results(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl."""
    file = RunFolder(run).evaluations_file
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
