"""What the tests of dataset_tools share: a cache of their own, and made-up trees and tars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dataset_tools import made_up


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    folder = tmp_path / "cache of the test"
    monkeypatch.setenv("LEOCLR_CACHE", str(folder))
    return folder


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes files as `write_files` does, and returns their root."""
    return lambda files: made_up.write_files(tmp_path / "tree", files)


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar of files (path → bytes), in the order given. `mode` and `format` are tarfile's."""

    def write(files: Any, name: str = "images.tar", **options: Any) -> Path:
        return made_up.write_tar(tmp_path / name, files, **options)

    return write
