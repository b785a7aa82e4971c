"""`leoclr-fast bench loss`: what the loss costs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class BenchLoss(CommonFlags):
    """Time forward and backward of every InfoNCE, in turns, beside one cross entropy for each key."""

    batch_size: int = 256
    queue_size: int = 65536
    dim: int = 128
    """Of the projection."""
    positives: int = 2
    """Keys of each query: 2 are LeOCLR's, 1 is MoCo-v2's."""
    temperature: float = 0.2
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of query, keys and queue; a training hands them over in fp32, whatever its own precision."""
    rounds: int = 15
    """Turns of each contestant, after two that are not counted."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    markdown: Path | None = None
    """Write the table to this file too."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.loss import bench_loss, loss_markdown
        from leoclr_fast.commands.written_page import command_line, write_page
        from leoclr_fast.distributed.process_group import resolve_device

        document = bench_loss(
            batch_size=self.batch_size,
            queue_size=self.queue_size,
            dim=self.dim,
            positives=self.positives,
            temperature=self.temperature,
            precision=self.precision,
            device=resolve_device(self.device),
            rounds=self.rounds,
        )
        page = loss_markdown(document, command_line("bench loss"))
        say(console, page)
        write_page(self.markdown, page)
        return document
