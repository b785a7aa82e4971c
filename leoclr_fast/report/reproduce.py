"""The command that makes a run again, from its recipe and what was changed of it."""

from __future__ import annotations

import math
import shlex
from typing import Any

from leoclr_fast.config_file import as_plain
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.run_record import RunRecord
from leoclr_fast.report.values import number, positive

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
    words = [*_program(run), "pretrain", run.recipe, "--data", str(run.data.get("path", "PATH")), "--out", "RUN"]
    for name, (_, value) in changed_settings(run).items():
        words += _flag(name, value)
    last_step = number(run.metrics.starts[-1].get("last_step")) if run.metrics.starts else math.nan
    if last_step < run.total_steps:
        words += ["--max-steps", f"{last_step:.0f}"]
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


def _program(run: RunRecord) -> list[str]:
    """torchrun with as many ranks on as many machines; `leoclr-fast` for a single rank."""
    ranks = number(run.environment.get("world_size"))
    if not ranks > 1:
        return ["leoclr-fast"]
    per_node = positive(run.environment.get("local_world_size"))
    if not per_node < ranks:
        return ["torchrun", "--nproc-per-node", f"{ranks:.0f}", "-m", "leoclr_fast"]
    nodes = ["--nnodes", f"{math.ceil(ranks / per_node)}", "--nproc-per-node", f"{per_node:.0f}"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST_NODE:29500"]
    return ["torchrun", *nodes, *meeting, "-m", "leoclr_fast"]


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
