"""Values as text: numbers that may be unknown, and settings."""

from __future__ import annotations

import math
from typing import Any


def figure_of(value: float, form: str, unit: str = "") -> str:
    """A figure with its unit, or that it is not known (NaN, infinite)."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not known"


def shown_value(value: Any) -> str:
    """A setting, as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(map(shown_value, value))
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
