"""`leoclr-fast finetune`: how far a few labels go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import TrainingEvaluationFlags, is_paused, say_paused
from leoclr_fast.evaluate.protocols import FineTuneProtocol


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingEvaluationFlags):
    """Fine-tune the network on a part of the labels: leoclr-fast finetune RUN --data PATH --percent 1."""

    data: Path
    """A part of train is learned from; tested is val, else test, else a held-out part of train."""
    percent: tuple[float, ...] = ()
    """Shares of train, one after the other: 1, or 1 2 5 10 20 50 100. Nested and class-balanced."""
    list: Path | None = None
    """Instead of --percent: a published list of the images to learn from, or one that `subset` wrote."""
    subset_seed: int = 0
    """Which images --percent takes; as --seed of `subset`."""
    protocol: Annotated[FineTuneProtocol, tyro.conf.arg(name="")] = field(default_factory=FineTuneProtocol)
    """SimCLR's; changes the result."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.finetune import run_finetune

        results = run_finetune(
            self.weights,
            self.data,
            self.protocol,
            self.options,
            percents=self.percent,
            list_file=self.list,
            subset_seed=self.subset_seed,
            console=console,
        )
        for result in results:
            if is_paused(result):
                say_paused(console, result)
                continue
            say(
                console,
                f"finetune on {result['percent']:.4g} % of the labels: top-1 {result['top1']:.2f} %, top-5 "
                f"{result['top5']:.2f} % ({result['labels']:,} labels, sha256 {result['labels_sha256'][:16]}…, "
                f"{result['epochs']} epochs, learning rate {result['lr']:g}; {result['val_images']:,} images of "
                f"{result['val_split']} tested)",
            )
        return {"evaluations": results} if results else {}
