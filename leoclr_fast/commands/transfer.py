"""`leoclr-fast transfer`: what the network is worth on other data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened, say_paused
from leoclr_fast.evaluate.protocols import TrainingOptions, TransferProtocol


@dataclass(frozen=True, kw_only=True)
class Transfer(EvaluationFlags):
    """Fine-tune the network on another data set: leoclr-fast transfer RUN DATASET --data PATH."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """cifar10, cifar100, cars (Stanford Cars), pets (Oxford-IIIT Pets) or birdsnap."""
    data: Path
    """As torchvision lays it out on disk, or any source of images with its classes and splits."""
    protocol: Annotated[TransferProtocol, Flattened] = field(default_factory=TransferProtocol)
    """SimCLR's: 56 trials and the final training, of 20,000 steps each. Changes the result."""
    options: Annotated[TrainingOptions, Flattened] = field(default_factory=TrainingOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import transfer
        from leoclr_fast.evaluate.transfer_data import TRANSFER_SETS

        values = transfer.run(self.weights, self.dataset, self.data, self.protocol, self.options, console=console)
        if values and not say_paused(console, values):
            metric = {"top1": "top-1", "mean_per_class": "mean per class"}[values["metric"]]
            say(
                console,
                f"transfer to {TRANSFER_SETS[self.dataset].title}: {metric} {values[values['metric']]:.2f} % "
                f"(learning rate {values['lr']:.4g}, weight decay {values['weight_decay']:.4g}, {values['steps']:,} "
                f"steps; {values['val_images']:,} test images)",
            )
        return values
