"""Templates to pages: one self-contained HTML file that fetches nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dataset_tools.terminal import printable
from dataset_tools.versions import installed_version
from leoclr_fast.report.plots import DrawnPlot
from leoclr_fast.report.run_record import duration, when

_TEMPLATES = Path(__file__).with_name("templates")


def rendered(template: Path, *, title: str, sections: dict[str, str], plots: Sequence[DrawnPlot], **values: Any) -> str:
    """The page that `template`, which extends base.html, makes of the values: each of them is text, whatever is in it.

    sections: id, unique on the page → heading. plots: all that the page shows; its script reads their values.
    """
    script = (_TEMPLATES / "page.js").read_text()
    pages = _pages(template.parent)
    page = pages.get_template(template.name).render(
        values,
        title=title,
        sections=sections,
        plots=plots,
        plot_data={drawn.plot.name: drawn.points for drawn in plots},
        style=Markup((_TEMPLATES / "page.css").read_text()),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=installed_version("leoclr-fast") or "of an unknown version",
        now=time.time(),
    )
    return printable(page)


@cache
def _pages(folder: Path) -> Environment:
    """The templates of a folder, on our base; each is compiled once."""
    pages = Environment(
        loader=FileSystemLoader([folder, _TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    pages.filters |= {"when": when, "value": shown_value, "form": format, "known": _known, "duration": duration}
    return pages


def shown_value(value: Any) -> str:
    """A setting, as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(map(shown_value, value))
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


def _known(value: float, form: str, unit: str = "") -> str:
    """A figure with its unit, or that it is not known (NaN, infinite)."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not known"
