"""The page of `parity`: every loader beside torchvision's, and its worst crops."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from leoclr_fast.parity.comparison import BackendParity, WorstCrop
from leoclr_fast.report.rendering import rendered

PARITY_HEADER = ("loader", "result", "images", "equal", "mean difference", "largest difference", "equal values")


def parity_page(results: Sequence[BackendParity], obstacles: Sequence[str], *, title: str) -> str:
    """The whole page, self-contained. Names of files and classes are text, whatever is in them."""
    return rendered(
        Path(__file__).with_suffix(".html"),
        title=title,
        heading=title,
        sections={"loaders": "Loaders", "worst": "Worst crops"},
        plots=[],
        results=results,
        failed=[f"{result.loader} on {result.data}" for result in results if not result.ok],
        header=PARITY_HEADER,
        rows=map(parity_cells, results),
        obstacles=obstacles,
        sheets=[[_sheet(crop) for crop in result.worst] for result in results],
    )


def parity_cells(result: BackendParity) -> list[str]:
    """A row below `PARITY_HEADER`."""
    return [
        f"{result.loader} on {result.data}",
        "within limits" if result.ok else "NOT within limits",
        f"{result.images:,}",
        f"not the {', '.join(sorted(result.unequal))}" if result.unequal else "indices, boxes, labels",
        f"{result.mean:.3f} (≤ {result.limits.mean:g})",
        f"{result.max} (≤ {result.limits.max:g})",
        f"{100 * result.counts[0] / max(1, result.counts.sum()):.2f} %",
    ]


def _sheet(crop: WorstCrop) -> dict[str, str]:
    """The oracle's crop, the loader's and their difference side by side, lossless; and what that is."""
    difference = np.abs(crop.oracle.astype(np.int16) - crop.ours.astype(np.int16))
    gain = max(1, 255 // max(1, int(difference.max())))
    sheet = np.concatenate([crop.oracle, crop.ours, (gain * difference).clip(0, 255).astype(np.uint8)], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True)
    return {
        "src": f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "description": (
            f"{crop.name}, {crop.view}: torchvision, the loader, and their difference {gain} times; on average "
            f"{crop.mean_difference:.3f} levels, at most {difference.max()}"
        ),
    }
