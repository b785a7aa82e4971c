"""What every command that evaluates weights has, and says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say

Flattened = tyro.conf.arg(name="")
"""The fields of a config are flags of the command itself."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(CommonFlags):
    """Whose weights."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """The --out of a pretrain (its final weights, else its newest checkpoint), or a final.safetensors."""


def say_paused(console: Console, values: dict[str, Any]) -> bool:
    """Say so if --max-steps ended an evaluation before it had a result; whether it did."""
    if values.get("complete", True):
        return False
    say(
        console,
        f"paused after step {values['step']:,}, as --max-steps asks, in {values['out']}; there is no result yet, and "
        "the same command without --max-steps continues",
    )
    return True
