"""Values that may be anything: numbers out of them, and text for readers."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float:
    """A number out of a document that anything may have written: NaN if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def positive(value: Any) -> float:
    """As `number`, and NaN for zero and less."""
    found = number(value)
    return found if found > 0 else math.nan


def figure_of(value: float, form: str, unit: str = "") -> str:
    """A figure with its unit, or that it is not known (NaN, infinite)."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not known"


def shown_value(value: Any) -> str:
    """A setting, as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(map(shown_value, value))
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
