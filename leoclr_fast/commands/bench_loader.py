"""`leoclr-fast bench loader`: how fast images come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class BenchLoader(CommonFlags):
    """Time our loaders beside torchvision's, FFCV's and DALI's own, in turns, each in a process of its own."""

    data: tuple[Path, ...]
    """The same images in one or several formats, such as an image folder and a .beton made of it: FFCV reads the one,
    DALI's own reader the other."""
    loaders: tuple[str, ...] = ()
    """Names of --loader, stock-torchvision, stock-ffcv, stock-dali; by default all that can run here."""
    views: int = 3
    """Of each image: 3 are LeOCLR's, 2 MoCo-v2's."""
    image_size: int = 224
    """Side of a view, pixels."""
    batch_size: int = 64
    rounds: int = 7
    """Turns of each contestant, after one that is not counted. A turn is one epoch."""
    max_images: int | None = None
    """At most so many images an epoch, a class-balanced choice."""
    workers: int | None = None
    """Threads or worker processes of each contestant; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    markdown: Path | None = None
    """Write the table to this file too."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.bench.loader import LoaderBenchConfig, bench_loader, loader_markdown
        from leoclr_fast.commands.written_page import command_line, write_page

        if not self.data:
            raise ValueError("bench loader needs images: give --data PATH [PATH …]")
        config = LoaderBenchConfig(
            loaders=self.loaders,
            views=self.views,
            image_size=self.image_size,
            batch_size=self.batch_size,
            rounds=self.rounds,
            max_images=self.max_images,
            workers=self.workers,
            device=self.device,
        )
        document = bench_loader(config, self.data, lambda line: say(console, line))
        page = loader_markdown(document, command_line("bench loader", *self.data))
        say(console, page)
        write_page(self.markdown, page)
        return document
