"""The Markdown page of a benchmark whose contestants are implementations of one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leoclr_fast.bench.tables import markdown_table


def kernel_page(
    title: str,
    setting: str,
    document: dict[str, Any],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    command: str | None = None,
) -> str:
    """Title, setting, machine, command, table, and what was left out.

    document: has `rounds`, `left_out` (implementation -> why) and `environment`, as `environment()` gives it.
    """
    machine = document["environment"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    lines = [f"# {title}", "", f"{setting}. {where}, torch {machine['versions']['torch']}.", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [f"Median [20 %, 80 %] of {document['rounds']} interleaved rounds.", ""]
    left_out = [f"- {name}: left out, since {why}." for name, why in document["left_out"].items()]
    return "\n".join(lines) + "\n" + markdown_table(header, cells) + "\n".join(["", *left_out, ""] if left_out else [])
