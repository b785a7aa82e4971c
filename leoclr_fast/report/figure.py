"""A plot on a page: drawing, legend, description and the values behind it."""

from __future__ import annotations

import math

import numpy as np

from leoclr_fast.report.elements import Markup, element, table
from leoclr_fast.report.plots import NUM_COLOURS, Curve, Plot, dash_array

_TABLE_ROWS = 60


def figure(plot: Plot, svg: Markup) -> Markup:
    """A plot with its legend, its note, a description for who cannot see it, and its values as a table."""
    described = f"{plot.title} over {plot.x_label}s. {' '.join(map(_described, plot.curves))}"
    legend = len(plot.curves) > 1
    return element(
        "figure",
        element("h3", f"{plot.title}, {plot.unit.strip()}" if plot.unit else plot.title),
        element("ul", [element("li", _swatch(curve), curve.label) for curve in plot.curves], class_="legend")
        if legend
        else None,
        element("div", svg, class_="plot", id=f"plot-{plot.name}", role="img", aria_label=described),
        element("figcaption", element("p", plot.note)) if plot.note else None,
        element("details", element("summary", "Values as a table"), _values(plot)),
    )


def _swatch(curve: Curve) -> Markup:
    colour = "var(--ink-soft)" if curve.reference else f"var(--series-{curve.style % NUM_COLOURS})"
    dashes = "4 3" if curve.reference else dash_array(curve.style)
    style = f"stroke: {colour}; stroke-width: 2.5"
    line = element("line", x1="0", y1="4", x2="26", y2="4", style=style, stroke_dasharray=dashes or None)
    return element("svg", line, viewBox="0 0 26 8", aria_hidden="true")


def _described(curve: Curve) -> str:
    """A curve in words: where it starts and ends, its lowest and its highest value."""
    finite = np.flatnonzero(np.isfinite(curve.y))
    if not len(finite):
        return f"{curve.label}: no value."
    y = curve.y[finite]
    return (
        f"{curve.label}: from {y[0]:.4g} at {curve.x[finite[0]]:.3g} to {y[-1]:.4g} at {curve.x[finite[-1]]:.3g}, "
        f"lowest {y.min():.4g}, highest {y.max():.4g}."
    )


def _values(plot: Plot) -> Markup:
    several = len(plot.curves) > 1
    per_curve = max(10, _TABLE_ROWS // len(plot.curves))
    rows: list[list[str]] = []
    chosen = False
    for curve in plot.curves:
        indices = range(len(curve.x))
        if len(indices) > per_curve:
            indices = np.unique(np.linspace(0, len(curve.x) - 1, per_curve).round().astype(int)).tolist()
            chosen = True
        for index in indices:
            value = curve.y[index]
            cells = [f"{curve.x[index]:.5g}", f"{value:.6g}" if math.isfinite(value) else "not a number"]
            rows.append([curve.label, *cells] if several else cells)
    head = [*(["curve"] if several else []), plot.x_label, plot.title + (f",{plot.unit}" if plot.unit else "")]
    note = ": evenly chosen values; all of them stand in metrics.jsonl" if chosen else ""
    return table(head, rows, f"{plot.title}{note}")
