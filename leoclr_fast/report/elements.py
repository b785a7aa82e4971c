"""HTML elements that cannot be broken by what they hold: every string is text, and is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_VOID = {"img", "link", "meta", "br"}


class Markup(str):
    """HTML that was made here; any other string is text."""

    __slots__ = ()


Content = str | Markup | None | Iterable["Content"]


def element(name: str, /, *content: Content, **attributes: str | bool | None) -> Markup:
    """`<name attributes>content</name>`: strings are escaped, None is nothing, attributes with None or False are left
    out, `class_` and `for_` lose their underscore, other underscores become hyphens."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        written += f" {attribute}" if value is True else f' {attribute}="{escape(str(value), quote=True)}"'
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def joined(content: Content) -> Markup:
    """Content after content."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(escape(content, quote=False))
    return Markup("".join(joined(part) for part in content))


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str, **attributes: str) -> Markup:
    """A table whose first column names its rows, in a box of its own that scrolls where the page is narrow."""
    body = [
        element("tr", element("th", row[0], scope="row"), [element("td", cell) for cell in row[1:]]) for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", [element("th", cell, scope="col") for cell in head])),
            element("tbody", body),
            **attributes,
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def embedded_json(identifier: str, document: Any) -> Markup:
    """Data for the page's script. Nothing in it can end the element: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{escape(identifier, quote=True)}">{text}</script>')
