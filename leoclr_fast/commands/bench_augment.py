"""`leoclr-fast bench augment`: what the photometric augmentation costs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.config import MethodName


@dataclass(frozen=True, kw_only=True)
class BenchAugment(CommonFlags):
    """Time jitter, grayscale, blur, flip and normalisation of one batch's views by every implementation, in turns."""

    method: MethodName = "leoclr"
    """Whose views: leoclr has three of each image, mocov2 two."""
    batch_size: int = 256
    """Images."""
    image_size: int = 224
    """Side of a view, pixels."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Of the views that come out."""
    rounds: int = 15
    """Turns of each contestant, after two that are not counted."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    markdown: Path | None = None
    """Write the table to this file too."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.augment import augment_markdown, bench_augment
        from leoclr_fast.commands.written_page import command_line, write_page
        from leoclr_fast.distributed.process_group import resolve_device

        document = bench_augment(
            method=self.method,
            batch_size=self.batch_size,
            image_size=self.image_size,
            precision=self.precision,
            device=resolve_device(self.device),
            rounds=self.rounds,
        )
        page = augment_markdown(document, command_line("bench augment"))
        say(console, page)
        write_page(self.markdown, page)
        return document
