from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataset_tools.sources import open_source


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is nothing at .*/missing. Give the path of a folder"):
        open_source(tmp_path / "missing")


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        open_source(tmp_path / "pipe")


def test_home_and_text_paths(write_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree({"a/1.jpg": b"1"})
    monkeypatch.setenv("HOME", str(root.parent))
    source = open_source(f"~/{root.name}")
    assert source.path == root
    assert str(source) == f"image folder {root} (train 1; 1 classes)"
