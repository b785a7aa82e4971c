"""A page that a command writes where its user wants it."""

from __future__ import annotations

from pathlib import Path

from dataset_tools.files import write_file


def write_page(path: Path | None, page: str) -> None:
    """Nothing without a path. Raises ValueError where the file cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
