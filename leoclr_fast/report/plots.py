"""Curves as inline SVG, drawn by matplotlib, in colours that the page's style sheet decides."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leoclr_fast.report.metrics_file import Floats

MAX_POINTS = 400
_NUM_COLOURS = 6
_TABLE_ROWS = 60

_WIDTH, _HEIGHT = 440, 250  # of the view box; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
_FONT_SIZE = 13
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# matplotlib writes colours into the SVG; these stand for the page's own and are replaced.
_INK, _GRID, _BAND = "#000001", "#000002", "#000003"
_SERIES = [f"#0000{16 + number:02x}" for number in range(_NUM_COLOURS)]
_VARIABLES = {_INK: "var(--ink-soft)", _GRID: "var(--grid)", _BAND: "var(--band)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": _FONT_SIZE,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.linewidth": 1,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line: y may hold NaNs, which are gaps. `low` and `high` draw a band around it."""

    label: str
    x: Floats
    y: Floats
    style: int
    """Its number among the page's runs: chooses colour and dashes."""
    reference: bool = False
    markers: bool = False
    low: Floats | None = None
    high: Floats | None = None

    @property
    def colour(self) -> str:
        """As the page's style sheet calls it."""
        return "var(--ink-soft)" if self.reference else f"var(--series-{self.style % _NUM_COLOURS})"

    @property
    def line_style(self) -> Any:
        """As matplotlib has it: solid, or where its dashes begin and how long they are."""
        return (0, (4, 3)) if self.reference else _DASHES[(self.style // _NUM_COLOURS) % len(_DASHES)]

    @property
    def dash_array(self) -> str:
        """The dashes, as SVG has them; empty for a solid line."""
        return "" if self.line_style == "solid" else " ".join(map(str, self.line_style[1]))

    @property
    def description(self) -> str:
        """In words: where it starts and ends, its lowest and its highest value."""
        finite = np.flatnonzero(np.isfinite(self.y))
        if not len(finite):
            return f"{self.label}: no value."
        x, y = self.x[finite], self.y[finite]
        return (
            f"{self.label}: from {y[0]:.4g} at {x[0]:.3g} to {y[-1]:.4g} at {x[-1]:.3g}, lowest {y.min():.4g}, "
            f"highest {y.max():.4g}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves over one x."""

    name: str
    """A word, unique on the page."""
    title: str
    x_label: str
    curves: list[Curve]
    unit: str = ""
    note: str = ""
    filling_until: float | None = None
    """x until which the queue fills: shaded."""
    from_zero: bool = False
    """Whether the y axis starts at 0."""

    @property
    def is_empty(self) -> bool:
        return not any(np.isfinite(curve.y).any() for curve in self.curves if not curve.reference)

    def values(self) -> tuple[list[list[str]], bool]:
        """Label, x and y of its points, as rows of a table; and whether that is a choice of them."""
        per_curve = max(10, _TABLE_ROWS // len(self.curves))
        rows = []
        for curve in self.curves:
            shown = min(per_curve, len(curve.x))
            for index in np.linspace(0, len(curve.x) - 1, shown).round().astype(int):
                value = f"{curve.y[index]:.6g}" if math.isfinite(curve.y[index]) else "not a number"
                rows.append([curve.label, f"{curve.x[index]:.5g}", value])
        return rows, any(len(curve.x) > per_curve for curve in self.curves)


class DrawnPlot(NamedTuple):
    """A plot as it stands on a page."""

    plot: Plot
    svg: Markup
    points: dict[str, Any]
    """What the page's script reads values from: the axes' place and the curves."""


def thinned(x: Floats, y: Floats, max_points: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """At most about `max_points` of the points: of each stretch the lowest and the highest, one NaN where it has
    any, and the first and last point of all. Points are chosen, never averaged."""
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points // 2 + 1).astype(np.int64)
    chosen = {0, len(x) - 1}
    for begin, end in pairwise(edges.tolist()):
        part = y[begin:end]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite):
            chosen |= {begin + int(finite[part[finite].argmin()]), begin + int(finite[part[finite].argmax()])}
        if len(finite) < len(part):
            chosen.add(begin + int(np.flatnonzero(~np.isfinite(part))[0]))
    kept = sorted(chosen)
    return x[kept], y[kept]


def drawn(plot: Plot, max_points: int = MAX_POINTS) -> DrawnPlot:
    """The plot as an SVG element, with at most so many points of each curve."""
    style: Any = _STYLE | {"svg.hashsalt": plot.name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        figure.patch.set_visible(False)
        place = (_LEFT / _WIDTH, _BOTTOM / _HEIGHT)
        size = (1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (_TOP + _BOTTOM) / _HEIGHT)
        axes = figure.add_axes((*place, *size))
        axes.patch.set_visible(False)
        axes.margins(x=0.01, y=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(plot.x_label)
        points = [_draw(axes, curve, max_points) for curve in plot.curves]
        axes.set_xlim(left=0)
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        if plot.filling_until is not None:
            limits = axes.get_xlim()
            axes.axvspan(limits[0], min(plot.filling_until, limits[1]), color=_BAND, linewidth=0, zorder=0)
            axes.set_xlim(limits)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    geometry = {
        "width": _WIDTH,
        "height": _HEIGHT,
        "box": [_LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM],
        "x": [x0, x1],
        "y": [y0, y1],
        "xLabel": plot.x_label,
        "unit": plot.unit,
        "curves": points,
    }
    return DrawnPlot(plot, _inlined(buffer.getvalue(), plot.name), geometry)


def _draw(axes: Any, curve: Curve, max_points: int) -> dict[str, Any]:
    x, y = thinned(curve.x, curve.y, max_points)
    own = _SERIES[curve.style % _NUM_COLOURS]
    colour, width, layer = (_INK, 1.3, 2) if curve.reference else (own, 1.8, 3)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0, zorder=1)
    few = not curve.reference and np.isfinite(y).sum() < 3
    marker = {"marker": "o", "markersize": 4.5} if curve.markers or few else {}
    axes.plot(x, y, color=colour, linewidth=width, linestyle=curve.line_style, zorder=layer, **marker)
    return {
        "label": curve.label,
        "colour": curve.colour,
        "reference": curve.reference,
        "x": [_compact(value) for value in x.tolist()],
        "y": [_compact(value) for value in y.tolist()],
    }


def _compact(value: float) -> float | None:
    """A number with seven digits; None for NaN and infinities."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _inlined(document: str, name: str) -> Markup:
    """matplotlib's SVG file as an element of the page: no prolog, no namespaces, no metadata, own ids and colours."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", svg)
    return Markup(re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg))
