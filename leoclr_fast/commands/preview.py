"""`leoclr-fast preview`: what training sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say
from dataset_tools.limits import Count
from leoclr_fast.recipes import get_recipe
from pipelines.config import Original


@dataclass(frozen=True, kw_only=True)
class Preview(CommonFlags):
    """A contact sheet: each image with its crop boxes, and all its views as training sees them."""

    data: Path
    """As in pretrain."""
    out: Path
    """The PNG to write."""
    recipe: str = "leoclr_imagenet_200ep"
    """Whose views."""
    original: Annotated[Original | None, tyro.conf.arg(name="views.original")] = None
    """As in pretrain."""
    rows: int = 8
    """Images."""
    seed: int = 0
    max_images: Count | None = None
    """Choose from at most this many images."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.sources import open_source
        from dataset_tools.splits import choose_splits
        from dataset_tools.subsets import limited
        from leoclr_fast.method.methods import METHODS
        from leoclr_fast.run.preview import write_preview

        if self.rows < 1:
            raise ValueError(f"--rows {self.rows} is not allowed: give at least 1")
        result = get_recipe(self.recipe).result
        split = limited(choose_splits(open_source(self.data)).pretrain, self.max_images)
        views = METHODS[result.method.name].views
        config = replace(result.views, original=self.original or result.views.original)
        rows = write_preview(self.out, split, views, config, seed=self.seed, rows=self.rows)
        say(console, f"{rows} images and their views: {self.out}")
        return {"out": str(self.out), "rows": rows, "views": [view.name for view in views]}
