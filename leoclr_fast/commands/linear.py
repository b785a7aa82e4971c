"""`leoclr-fast linear`: what the field compares methods by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import TrainingEvaluationFlags, is_paused, say_paused
from leoclr_fast.evaluate.protocols import LinearProtocol


@dataclass(frozen=True, kw_only=True)
class Linear(TrainingEvaluationFlags):
    """Linear classification of a frozen backbone's features: leoclr-fast linear RUN --data PATH."""

    data: Path
    """Learned from is train; tested is val, else test, else a held-out part of train."""
    protocol: Annotated[LinearProtocol, tyro.conf.arg(name="")] = field(default_factory=LinearProtocol)
    """MoCo-v2's; changes the result."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.linear import run_linear

        result = run_linear(
            self.weights,
            self.data,
            self.protocol,
            self.options,
            console=console,
        )
        if is_paused(result):
            say_paused(console, result)
        elif result:
            for entry in result["grid"] or ():
                held_out = entry["holdout_top1"]
                say(
                    console,
                    f"  learning rate {entry['lr']:g}: "
                    + (f"{held_out:.2f} % of the held-out images" if held_out is not None else "diverged"),
                )
            kind = "linear estimate (cached features)" if result["estimate"] else "linear"
            say(
                console,
                f"{kind} top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % (learning rate {result['lr']:g}; "
                f"{result['train_images'] - result['holdout_images']:,} images learned from, {result['val_images']:,} "
                f"of {result['val_split']} tested; backbone unchanged, sha256 {result['backbone_sha256_after'][:16]}…)",
            )
        return result
