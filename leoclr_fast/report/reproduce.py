"""The command that makes a run again, from its recipe and what was changed of it."""

from __future__ import annotations

import shlex
from typing import Any

from leoclr_fast.config_file import as_plain
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.run_record import RunRecord

_FLATTENED = ("result.", "speed.")  # these parts of the configuration have flags without a prefix


def changed_settings(run: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Dotted name → (value of the recipe, value of the run), where they differ. Empty for an unknown recipe."""
    if run.recipe not in RECIPES:
        return {}
    recipe = flat(as_plain(RECIPES[run.recipe]()))
    return {name: (recipe.get(name), value) for name, value in flat(run.config).items() if recipe.get(name) != value}


def reproducing_command(run: RunRecord) -> str | None:
    """`leoclr-fast pretrain …` with every flag that differs from the recipe; None if its recipe is not known here."""
    if run.recipe not in RECIPES:
        return None
    ranks = run.environment.get("world_size", 1)
    many = isinstance(ranks, int) and ranks > 1
    program = ["torchrun", "--nproc-per-node", str(ranks), "-m", "leoclr_fast"] if many else ["leoclr-fast"]
    words = [*program, "pretrain", run.recipe, "--data", str(run.data.get("path", "PATH")), "--out", "RUN"]
    for name, (_, value) in changed_settings(run).items():
        words += _flag(name, value)
    return shlex.join(words)


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names."""
    values: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _flag(name: str, value: Any) -> list[str]:
    for part in _FLATTENED:
        name = name.removeprefix(part)
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = flag.removeprefix("--").rpartition(".")
        return [flag] if value else [f"--{head}.no-{last}" if head else f"--no-{last}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]
