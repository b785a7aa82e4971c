"""The file that a user wants written."""

from __future__ import annotations

from pathlib import Path


def require_new_file(out: Path, *endings: str) -> None:
    """Raises ValueError if `out` has none of the endings, exists, or its folder does not."""
    if out.suffix not in endings:
        raise ValueError(f"--out {out} does not end in {' or '.join(endings)}, the format that is written; rename it")
    if out.exists():
        raise ValueError(f"--out {out} exists already and is not overwritten; give another name")
    if not out.parent.is_dir():
        raise ValueError(f"the folder of --out {out} does not exist; make it first")
