"""The command that makes a run again, from its recipe and what was changed of it."""

from __future__ import annotations

import math
from typing import Any

from leoclr_fast.config_file import as_plain, differences
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.run_record import RunRecord

_FLATTENED = ("result.", "speed.")  # these parts of the configuration have flags without a prefix


def changed_settings(run: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Dotted name → (value of the recipe, value of the run), where they differ. Empty for an unknown recipe."""
    if run.recipe not in RECIPES:
        return {}
    found = differences([as_plain(RECIPES[run.recipe]()), run.config])
    return {name: (of_recipe, value) for name, (of_recipe, value) in found.items()}


def reproducing_command(run: RunRecord) -> list[str] | None:
    """`leoclr-fast pretrain …` with every flag that differs from the recipe, as words for `shlex.join`.

    None if its recipe is not known here.
    """
    if run.recipe not in RECIPES:
        return None
    words = [*_program(run), "pretrain", run.recipe, "--data", run.data.path, "--out", "RUN"]
    for name, (_, value) in changed_settings(run).items():
        words += _flag(name, value)
    last_step = run.metrics.starts[-1].last_step if run.metrics.starts else None
    if last_step is not None and last_step < run.total_steps:
        words += ["--max-steps", str(last_step)]
    return words


def _program(run: RunRecord) -> list[str]:
    """torchrun with as many ranks on as many machines; `leoclr-fast` for a single rank."""
    ranks = run.environment.world_size
    per_node = run.environment.local_world_size or ranks
    if ranks == 1:
        return ["leoclr-fast"]
    if per_node >= ranks:
        return ["torchrun", "--nproc-per-node", str(ranks), "-m", "leoclr_fast"]
    nodes = ["--nnodes", str(math.ceil(ranks / per_node)), "--nproc-per-node", str(per_node)]
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
