"""The page of `parity`: every loader beside torchvision's, its worst crops, and what the data layer draws."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from leoclr_fast.parity.comparison import EDGE, BackendParity, WorstCrop
from leoclr_fast.parity.drawn_parameters import Histogram, Share
from leoclr_fast.report.document import document
from leoclr_fast.report.elements import Content, Markup, element, table
from leoclr_fast.report.figure import figure
from leoclr_fast.report.plots import Curve, Plot, svg_of

_SHOWN_SIDE = 160


def parity_page(
    results: Sequence[BackendParity],
    obstacles: Sequence[str],
    histograms: Sequence[Histogram],
    shares: Sequence[Share],
    *,
    title: str,
) -> str:
    """The whole page, self-contained. Names of files and classes are text, whatever is in them."""
    failed = [result for result in results if not result.ok]
    sentence = (
        f"{len(results) - len(failed)} of {len(results)} comparisons are within their limits"
        + (f"; not {', '.join(f'{result.loader} on {result.data}' for result in failed)}" if failed else "")
        + "."
    )
    figures, plot_data = _histograms(histograms)
    return document(
        title=title,
        heading=title,
        opening=element("p", sentence, class_="verdict"),
        sections=[
            ("loaders", "Loaders", _loaders(results, obstacles)),
            ("worst", "Worst crops", _worst(results)),
            ("drawn", "What is drawn", [_shares(shares), element("div", figures, class_="plots")]),
        ],
        plot_data=plot_data,
    )


def _loaders(results: Sequence[BackendParity], obstacles: Sequence[str]) -> Content:
    rows = []
    for result in results:
        total = max(1, int(result.counts.sum()))
        same = [
            name
            for name, is_same in (
                ("indices", result.same_indices),
                ("boxes", result.same_boxes),
                ("labels", result.same_labels),
            )
            if is_same
        ]
        rows.append(
            [
                f"{result.loader} on {result.data}",
                "within limits" if result.ok else "NOT within limits",
                f"{result.images:,}",
                ", ".join(same) or "nothing",
                f"{result.mean:.3f} (≤ {result.limits.mean:g})",
                f"{result.max} (≤ {result.limits.max:g})",
                f"{100 * result.counts[0] / total:.2f} %",
                f"{result.edge_mean:.3f}",
                str(result.edge_max),
            ]
        )
    head = [
        "loader", "verdict", "images", "equal", "mean difference", "largest difference", "equal values", "edge: mean",
        "edge: largest",
    ]  # fmt: skip
    missing = [element("p", "Not compared:"), element("ul", [element("li", line) for line in obstacles])]
    return [
        element(
            "p",
            "The oracle is the torchvision loader: Pillow decodes and resizes. Order, boxes and labels must be equal. "
            f"Differences are absolute, in levels of 255, over all views; the outer {EDGE} pixels of a crop are "
            "counted apart, since DALI's filter reads beyond the box there.",
            class_="soft",
        ),
        table(head, rows, "Every loader against torchvision"),
        missing if obstacles else None,
    ]


def _worst(results: Sequence[BackendParity]) -> Content:
    parts: list[Content] = []
    for result in results:
        parts.append(element("h3", f"{result.loader} on {result.data}"))
        if result.max == 0 and result.edge_max == 0:
            parts.append(element("p", "Every value is equal."))
            continue
        parts += [_pair(crop) for crop in result.worst]
    return parts


def _pair(crop: WorstCrop) -> Markup:
    difference = np.abs(crop.oracle.astype(np.int16) - crop.ours.astype(np.int16))
    gain = max(1, 255 // max(1, int(difference.max())))
    sheet = np.concatenate([crop.oracle, crop.ours, (gain * difference).clip(0, 255).astype(np.uint8)], axis=1)
    described = (
        f"{crop.name}, {crop.view}: torchvision, the loader, and their difference {gain} times; on average "
        f"{crop.mean_difference:.3f} levels, at most {difference.max()}"
    )
    width = 3 * _SHOWN_SIDE
    return element(
        "figure",
        element("img", src=_lossless(sheet), alt=described, width=str(width), height=str(_SHOWN_SIDE), class_="sheet"),
        element("figcaption", described),
    )


def _lossless(pixels: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shares(shares: Sequence[Share]) -> Markup:
    rows = [
        [
            share.name,
            f"{share.draws:,}",
            f"{100 * share.share:.2f} %",
            f"{100 * share.expected:g} %",
            f"{share.deviation:+.1f}" if math.isfinite(share.deviation) else "never expected",
        ]
        for share in shares
    ]
    head = ["what", "draws", "happened", "expected", "off, standard deviations"]
    return table(head, rows, "How often what is random happens")


def _histograms(histograms: Sequence[Histogram]) -> tuple[list[Markup], dict[str, Any]]:
    figures, plot_data = [], {}
    for number, histogram in enumerate(histograms):
        plot = Plot(
            name=f"drawn{number}",
            title=f"Density: {histogram.name.lower()}",
            x_label=histogram.name + histogram.unit.replace(" ", ", ", 1),
            curves=[
                Curve(label="drawn", x=histogram.centers, y=histogram.density, style=0),
                Curve(label="expected", x=histogram.centers, y=histogram.expected, style=0, reference=True),
            ],
            from_zero=True,
            x_counts=False,
        )
        svg, plot_data[plot.name] = svg_of(plot)
        figures.append(figure(plot, svg))
    return figures, plot_data
