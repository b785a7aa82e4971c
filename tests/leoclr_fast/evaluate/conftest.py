"""The commands that evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import refused


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
