"""`leoclr-fast parity`: do all loaders hand out the same crops?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from leoclr_fast.parity.comparison import ParityConfig


@dataclass(frozen=True, kw_only=True)
class Parity(CommonFlags):
    """Every loader against torchvision's, pixel by pixel, as a page. Exit code 1 if one is not within its limits."""

    data: tuple[Path, ...]
    """The images, in one or several formats, such as an image folder and a .beton made of it."""
    out: Path
    """The HTML page to write."""
    config: Annotated[ParityConfig, tyro.conf.arg(name="")] = field(default_factory=ParityConfig)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.commands.written_page import write_page
        from leoclr_fast.parity.comparison import measure_parity
        from leoclr_fast.parity.page import parity_page

        if not self.data:
            raise ValueError("parity needs images: give --data PATH [PATH …]")
        results, obstacles = measure_parity(self.config, self.data, lambda line: say(console, line))
        missing = [name for name in self.config.loaders if name not in {result.loader for result in results}]
        if missing or not results:
            raise RuntimeError(f"nothing was compared for {', '.join(missing) or 'any loader'}: {'; '.join(obstacles)}")
        title = f"Parity of the loaders on {', '.join(path.name for path in self.data)}"
        write_page(self.out, parity_page(results, obstacles, title=title))
        say(console, f"parity: {self.out}")
        return {
            "ok": all(result.ok for result in results),
            "out": str(self.out),
            "rows": [result.row() for result in results],
            "not_compared": obstacles,
        }
