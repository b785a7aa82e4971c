"""`leoclr-fast finetune`: how far a few labels go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened, say_paused
from leoclr_fast.evaluate.protocols import FineTuneProtocol, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Finetune(EvaluationFlags):
    """Fine-tune the network on a part of the labels: leoclr-fast finetune RUN --data PATH --percent 1."""

    data: Path
    """A part of train is learned from; tested is val, else test, else a held-out part of train."""
    protocol: Annotated[FineTuneProtocol, Flattened]
    """SimCLR's; changes the result."""
    options: Annotated[TrainingOptions, Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import finetune

        values = finetune.run(self.weights, self.data, self.protocol, self.options, console=console)
        for found in values.get("evaluations", ()):
            if not say_paused(console, found):
                say(
                    console,
                    f"finetune on {found['percent']:.4g} % of the labels: top-1 {found['top1']:.2f} %, top-5 "
                    f"{found['top5']:.2f} % ({found['labels']:,} labels, sha256 {found['labels_sha256'][:16]}…, "
                    f"{found['epochs']} epochs, learning rate {found['lr']:g}; {found['val_images']:,} images of "
                    f"{found['val_split']} tested)",
                )
        return values
