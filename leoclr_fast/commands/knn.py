"""`leoclr-fast knn`: the quickest evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened
from leoclr_fast.evaluate.protocols import KnnProtocol, ViewOptions


@dataclass(frozen=True, kw_only=True)
class Knn(EvaluationFlags):
    """Weighted kNN accuracy of a frozen backbone: leoclr-fast knn RUN --data PATH."""

    data: Path
    """As in pretrain: the bank is train, the queries are val, else test, else a held-out part of train."""
    protocol: Annotated[KnnProtocol, Flattened] = field(default_factory=KnnProtocol)
    options: Annotated[ViewOptions, Flattened] = field(default_factory=ViewOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate import knn

        values = knn.run(self.weights, self.data, self.protocol, self.options, console=console)
        if values:
            say(
                console,
                f"kNN top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} % (k = {values['k']}, temperature "
                f"{values['temperature']:g}; {values['bank_images']:,} images in the bank, "
                f"{values['query_images']:,} queries)",
            )
        return values
