"""`leoclr-fast bench loader`: how fast images come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class BenchLoader(CommonFlags):
    """Time our loaders beside torchvision's, FFCV's and DALI's own, in turns, each in a process of its own."""

    data: tuple[Path, ...] = ()
    """The same images in one or several formats, such as an image folder and a .beton made of it: FFCV reads the one,
    DALI's own reader the other."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run", metavar="RUN")] = None
    """The --out of a pretrain, instead of --data: times its loader on its images, at its views, image size and batch
    size, and keeps the result there, for its report."""
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
        from leoclr_fast.bench.loader import LoaderBenchConfig, as_run_loads, bench_loader, loader_markdown
        from leoclr_fast.commands.written_page import command_line, write_page
        from leoclr_fast.run.folder import RunFolder, write_json

        if bool(self.data) == (self.run_folder is not None):
            raise ValueError("bench loader needs images: give --data PATH [PATH …], or --run RUN, and not both")
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
        data, folder = self.data, None
        if self.run_folder is not None:
            folder = RunFolder(self.run_folder)
            config, images = as_run_loads(folder, config)
            data = (images,)
        document = bench_loader(config, data, lambda line: say(console, line))
        page = loader_markdown(document, command_line("bench loader", *data, *filter(None, [self.run_folder])))
        say(console, page)
        write_page(self.markdown, page)
        if folder is not None:
            write_json(folder.loader_bench_file, document)
            say(console, f"kept in {folder.loader_bench_file}; leoclr-fast report {folder.path} shows it")
        return document
