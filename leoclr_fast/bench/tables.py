"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned; ends with a newline.

    A bar in a cell is escaped. Raises ValueError for a row of another length.
    """
    lines = [_line(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells does not fit a header of {len(header)}: {list(row)}")
        lines.append(_line(row))
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 1, *, missing: str = "–") -> str:
    """With thousands separators; `missing` for None."""
    return missing if value is None else f"{value:,.{digits}f}"


def spread(median: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """`median [low, high]`."""
    if median is None or low is None or high is None:
        return number(None)
    return f"{number(median, digits)} [{number(low, digits)}, {number(high, digits)}]"


def percent(value: float | None, digits: int = 1) -> str:
    """A share from 0 to 1, as per cent."""
    return number(None) if value is None else f"{100 * value:.{digits}f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
