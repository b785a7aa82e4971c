"""`leoclr-fast knn`: the quickest evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.config import SpeedConfig
from pipelines.config import LoaderConfig


@dataclass(frozen=True, kw_only=True)
class Knn(CommonFlags):
    """Weighted kNN accuracy of a run's frozen backbone."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """The --out of a pretrain."""
    data: Path
    """As in pretrain: the bank is train, the queries are val, else test, else a held-out part of train."""
    k: int | None = None
    """Neighbours that vote; the run's own if not given."""
    temperature: float | None = None
    """Weight of a neighbour: exp(cosine similarity / temperature); the run's own if not given."""
    batch_size: int = 256
    """Images per forward pass."""
    max_images: int | None = None
    """At most this many images in the bank, and in the queries."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the backbone."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Changes only the speed."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.run_knn import run_knn

        result = run_knn(
            self.run_folder,
            self.data,
            SpeedConfig(device=self.device, precision=self.precision, loader=self.loader),
            k=self.k,
            temperature=self.temperature,
            batch_size=self.batch_size,
            max_images=self.max_images,
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
