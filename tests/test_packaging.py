"""What an installed wheel holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("dataset_tools", "pipelines", "leoclr_fast")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert len(found) >= 7
    assert set(listed) == found
