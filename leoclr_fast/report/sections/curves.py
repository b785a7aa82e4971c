"""Curves of losses, accuracies and speeds over the steps, with the expected one."""

from __future__ import annotations

from typing import Any

from leoclr_fast.report.curves import plots_of
from leoclr_fast.report.elements import Content, element
from leoclr_fast.report.figure import figure
from leoclr_fast.report.plots import MAX_POINTS, svg_of
from leoclr_fast.report.reference import Reference
from leoclr_fast.report.run_record import RunRecord

_POINTS_OF_A_PAGE = 3200  # of each plot, over all runs: keeps twenty runs under 2 MB


def curves_of(
    runs: list[RunRecord], labels: list[str], reference: Reference | None, no_reference: str
) -> tuple[Content, dict[str, Any]]:
    """The section, and the values of its plots for the page's script."""
    plots = plots_of(runs, labels, reference)
    if not plots:
        return element("p", "Nothing was logged yet, so there is nothing to draw."), {}
    max_points = max(50, min(MAX_POINTS, _POINTS_OF_A_PAGE // len(runs)))
    figures, plot_data = [], {}
    for plot in plots:
        svg, plot_data[plot.name] = svg_of(plot, max_points)
        figures.append(figure(plot, svg))
    source: Content = None
    if len(runs) == 1:
        source = f"Expected curve: {reference.source}." if reference is not None else no_reference
    return [
        element("p", "Point at a curve, or focus a plot and press the arrow keys, to read its values.", class_="soft"),
        element("p", source, class_="soft") if source else None,
        element("div", figures, class_="plots"),
    ], plot_data
