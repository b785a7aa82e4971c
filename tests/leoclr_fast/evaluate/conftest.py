"""A run whose weights are evaluated, and the commands that do it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.leoclr_fast.evaluated import copy_of, evaluated, pretrained_run
from tests.leoclr_fast.training.test_bad_input import refused


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("evaluated") / "run", tiny_data)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run of its own, which nothing was evaluated of."""
    return copy_of(tiny_run, tmp_path)


@dataclass(frozen=True)
class Commands:
    """Evaluations on a command line, of the tiny data if no other is given."""

    capsys: pytest.CaptureFixture[str]
    data: Path

    def __call__(self, name: str, *arguments: object) -> dict[str, Any]:
        """The JSON of one that must succeed."""
        return evaluated(self.capsys, name, *self._whole(arguments))

    def refused(self, name: str, *arguments: object) -> str:
        """The message of one that must fail."""
        return refused(self.capsys, name, *self._whole(arguments), "--device=cpu")

    def _whole(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        return arguments if "--data" in arguments else (*arguments, "--data", self.data)


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tiny_data: Path) -> Commands:
    return Commands(capsys, tiny_data)
