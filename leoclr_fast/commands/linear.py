"""`leoclr-fast linear`: what the field compares methods by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened, say_paused
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Linear(EvaluationFlags):
    """Linear classification of a frozen backbone's features: leoclr-fast linear RUN --data PATH."""

    data: Path
    """Learned from is train; tested is val, else test, else a held-out part of train."""
    protocol: Annotated[LinearProtocol, Flattened] = field(default_factory=LinearProtocol)
    """MoCo-v2's; changes the result."""
    options: Annotated[TrainingOptions, Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import linear

        values = linear.run(self.weights, self.data, self.protocol, self.options, console=console)
        if not values or say_paused(console, values):
            return values
        for entry in values["grid"] or ():
            held_out = entry["holdout_top1"]
            reached = f"{held_out:.2f} % of the held-out images" if held_out is not None else "diverged"
            say(console, f"  learning rate {entry['lr']:g}: {reached}")
        kind = "linear estimate (cached features)" if values["estimate"] else "linear"
        say(
            console,
            f"{kind} top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} % (learning rate {values['lr']:g}; "
            f"{values['train_images'] - values['holdout_images']:,} images learned from, {values['val_images']:,} "
            f"of {values['val_split']} tested; backbone unchanged, sha256 {values['backbone_sha256_after'][:16]}…)",
        )
        return values
