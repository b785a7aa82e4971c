"""The page of a benchmark in Markdown: setting, command, notes, one table, remarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def bench_page(
    title: str,
    setting: str,
    table: str,
    *,
    rounds: str,
    command: str | None = None,
    notes: Iterable[str] = (),
    remarks: Iterable[str] = (),
) -> str:
    """Everything that a benchmark prints. rounds: what the medians of the table are of."""
    head = [f"# {title}", "", f"{setting}.", "", *([f"`{command}`", ""] if command else [])]
    listed = [f"- {note}" for note in notes]
    body = [*listed, *([""] if listed else []), f"Median [20 %, 80 %] of {rounds}", "", table]
    return "\n".join([*head, *body, *(f"- {remark}" for remark in remarks)]).rstrip("\n") + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned; ends with a newline.

    A bar in a cell is escaped.
    """
    lines = [_line(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += map(_line, rows)
    return "\n".join(lines) + "\n"


def table_of(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A `markdown_table` with a line for each row. columns: heading -> the cell of a row."""
    return markdown_table(list(columns), ([cell(row) for cell in columns.values()] for row in rows))


def number(value: float | None, digits: int = 1) -> str:
    """With thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def spread(row: Mapping[str, float], name: str, digits: int = 1) -> str:
    """`median [low, high]` of a quantity of a row that has its quantiles as NAME_q20 and NAME_q80."""
    return f"{row[name]:,.{digits}f} [{row[f'{name}_q20']:,.{digits}f}, {row[f'{name}_q80']:,.{digits}f}]"


def percent(value: float | None, digits: int = 1) -> str:
    """A share from 0 to 1, as per cent."""
    return number(None) if value is None else f"{100 * value:.{digits}f} %"


def interval(ratio: Mapping[str, float], digits: int = 3) -> str:
    """A median ratio with its bootstrap interval, as `median_interval` gives it."""
    low, high = ratio["low"], ratio["high"]
    return f"{ratio['median']:.{digits}f} (95 % interval {low:.{digits}f} to {high:.{digits}f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
