"""A run whose weights are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.leoclr_fast.evaluated import pretrained_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("evaluated") / "run", tiny_data)
