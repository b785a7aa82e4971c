"""A Markdown page that a command writes where its user wants it, with the command that made it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dataset_tools.files import write_file


def command_line(name: str, *paths: Path | None) -> str:
    """The command as it was typed, without the folders of `paths`: `leoclr-fast NAME …`.

    Flags alone where another program than the command line runs it.
    """
    words = sys.argv[1:]
    typed = words[len(name.split()) :] if words[: len(name.split())] == name.split() else []
    line = shlex.join(["leoclr-fast", *name.split(), *typed])
    for path in paths:
        if path is not None:
            line = line.replace(str(path), path.name)
    return line


def write_page(path: Path | None, page: str) -> None:
    """Nothing without a path. Raises ValueError where the file cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
