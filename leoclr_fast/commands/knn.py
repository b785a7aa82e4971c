"""`leoclr-fast knn`: the quickest evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags


@dataclass(frozen=True, kw_only=True)
class Knn(EvaluationFlags):
    """Weighted kNN accuracy of a frozen backbone: leoclr-fast knn RUN --data PATH."""

    data: Path
    """As in pretrain: the bank is train, the queries are val, else test, else a held-out part of train."""
    k: int | None = None
    """Neighbours that vote; the run's own if not given."""
    temperature: float | None = None
    """Weight of a neighbour: exp(cosine similarity / temperature); the run's own if not given."""
    batch_size: int = 256
    """Images per forward pass."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.run_knn import run_knn

        result = run_knn(
            self.weights,
            self.data,
            self.speed,
            k=self.k,
            temperature=self.temperature,
            batch_size=self.batch_size,
            max_images=self.max_images,
            untrained=self.untrained,
            image_size=self.image_size,
        )
        if result:
            say(
                console,
                f"kNN top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % (k = {result['k']}, temperature "
                f"{result['temperature']:g}; {result['bank_images']:,} images in the bank, "
                f"{result['query_images']:,} queries)"
                if result["top1"] is not None
                else result["note"],
            )
        return result
