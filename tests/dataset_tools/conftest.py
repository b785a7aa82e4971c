"""What the tests of dataset_tools share: made-up trees of files, and the folder of real data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Files = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    folder = tmp_path / "cache of the test"
    monkeypatch.setenv("LEOCLR_CACHE", str(folder))
    return folder


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[[Files], Path]:
    """Writes files (path → bytes; a path that ends in "/" is an empty folder) and returns their root."""

    def write(files: Files) -> Path:
        root = tmp_path / "tree"
        root.mkdir()
        for name, data in files.items():
            path = root / name
            if name.endswith("/"):
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return root

    return write


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar of files (path → bytes), in the order given. `mode` and `format` are tarfile's."""

    def write(files: Files, name: str = "images.tar", mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write
