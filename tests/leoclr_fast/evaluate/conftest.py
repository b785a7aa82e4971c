"""A run whose weights are evaluated, and the commands that do it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import refused


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """One epoch, in float32."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    pretrain(tiny_config(result__epochs=1, speed__precision="fp32"), tiny_data, out)
    return out


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run of its own, which nothing was evaluated of."""
    ignored = shutil.ignore_patterns("evaluations*", ".lock")
    return Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=ignored))


@dataclass(frozen=True)
class Commands:
    """Evaluations on a command line, of the tiny data if no other is given."""

    capsys: pytest.CaptureFixture[str]
    data: Path

    def __call__(self, name: str, *arguments: object) -> dict[str, Any]:
        """The JSON of one that must succeed."""
        return succeeded(self.capsys, name, *self._whole(arguments))[0]

    def refused(self, name: str, *arguments: object) -> str:
        """The message of one that must fail."""
        return refused(self.capsys, name, *self._whole(arguments))

    def _whole(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        data = () if "--data" in arguments else ("--data", self.data)
        return (*arguments, *data, "--device=cpu")


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tiny_data: Path) -> Commands:
    return Commands(capsys, tiny_data)
