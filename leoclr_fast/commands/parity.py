"""`leoclr-fast parity`: do all loaders hand out the same crops?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class Parity(CommonFlags):
    """Every loader against torchvision's, pixel by pixel, as a page. Exit code 1 if one is not within its limits."""

    data: tuple[Path, ...]
    """The images, in one or several formats, such as an image folder and a .beton made of it."""
    out: Path
    """The HTML page to write."""
    loaders: tuple[str, ...] = ()
    """Names of --loader; by default all that can run here."""
    max_images: int = 256
    """At most so many images, a class-balanced choice."""
    image_size: int = 224
    """Side of a view, pixels."""
    batch_size: int = 32
    seed: int = 0
    """Draws the boxes."""
    workers: int | None = None
    """Threads or worker processes of each loader; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.commands.written_page import write_page
        from leoclr_fast.parity.comparison import ParityConfig, measure_parity
        from leoclr_fast.parity.drawn_parameters import drawn_parameters
        from leoclr_fast.parity.page import parity_page
        from pipelines.config import ViewConfig
        from pipelines.views import LEOCLR_VIEWS

        if not self.data:
            raise ValueError("parity needs images: give --data PATH [PATH …]")
        config = ParityConfig(
            loaders=self.loaders,
            max_images=self.max_images,
            image_size=self.image_size,
            batch_size=self.batch_size,
            seed=self.seed,
            workers=self.workers,
            device=self.device,
        )
        results, obstacles = measure_parity(config, self.data, lambda line: say(console, line))
        views = ViewConfig(image_size=self.image_size)
        histograms, shares = drawn_parameters(LEOCLR_VIEWS, views, seed=self.seed)
        title = f"Parity of the loaders on {', '.join(path.name for path in self.data)}"
        write_page(self.out, parity_page(results, obstacles, histograms, shares, title=title))
        say(console, f"parity: {self.out}")
        return {
            "ok": all(result.ok for result in results),
            "out": str(self.out),
            "rows": [
                {
                    "loader": result.loader,
                    "data": result.data,
                    "ok": result.ok,
                    "images": result.images,
                    "mean": result.mean,
                    "max": result.max,
                    "edge_mean": result.edge_mean,
                    "edge_max": result.edge_max,
                    "same_indices": result.same_indices,
                    "same_boxes": result.same_boxes,
                    "same_labels": result.same_labels,
                }
                for result in results
            ],
            "not_compared": obstacles,
            "shares": {share.name: share.share for share in shares},
        }
