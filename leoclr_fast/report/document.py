"""The shell of a page: one self-contained HTML file that fetches nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from leoclr_fast.report.elements import Content, Markup, element, embedded_json
from leoclr_fast.report.run_record import when

_FOLDER = Path(__file__).parent

Section = tuple[str, str, Content]
"""An id, unique on the page; a heading; what stands below it."""


def document(
    *, title: str, heading: str, opening: Content, sections: Sequence[Section], plot_data: dict[str, Any]
) -> str:
    """The page: heading and opening, links to the sections, the sections.

    plot_data: name of each plot -> what `plots.svg_of` returns beside the drawing: the script reads values off it.
    """
    script = (_FOLDER / "page.js").read_text()
    first = sections[0]
    body = [
        element("a", f"Skip to the {first[1].lower()}", href=f"#{first[0]}", class_="skip"),
        element(
            "header",
            element("h1", heading),
            opening,
            element(
                "nav",
                element("ul", [element("li", element("a", name, href=f"#{key}")) for key, name, _ in sections]),
                aria_label="Sections",
            ),
        ),
        element(
            "main",
            [
                element(
                    "section", element("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title"
                )
                for key, name, content in sections
            ],
        ),
        element(
            "footer",
            f"Written by leoclr-fast {_version()} on {when(time.time())}. One file: nothing in it is fetched from "
            "anywhere.",
        ),
        embedded_json("plot-data", plot_data),
        Markup(f"<script>{script}</script>"),
    ]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        Markup(f"<style>{(_FOLDER / 'page.css').read_text()}</style>"),
    ]
    page = element("html", element("head", head), "\n", element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _version() -> str:
    try:
        return metadata.version("leoclr-fast")
    except metadata.PackageNotFoundError:
        return "of an unknown version"
