"""Which numbers a setting may have, one rule for every config and every flag; and what to say of an unknown name.

The limits of a field are part of its type, `temperature: Annotated[float, Meta(ge=1e-4)]`, as msgspec knows them too.
Those of every field: an integer has 64 bits; a float is 0, or float32 holds it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from msgspec import Meta

MAX_INTEGER, LEAST_FLOAT, MAX_FLOAT = 2**63 - 1, 1e-37, 1e38

Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e8)]
"""At most three years: what clocks and locks can wait."""
Epochs = Annotated[int, Meta(ge=1, le=10**6)]
Momentum = Annotated[float, Meta(ge=0, lt=1)]
WeightDecay = Annotated[float, Meta(ge=0)]
Temperature = Annotated[float, Meta(ge=1e-4, le=1e4)]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that does not exist: the nearest ones, and all."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"there is no {kind} {name!r}.{hint} Allowed: {', '.join(known)}."


def require_allowed(config: Any) -> None:
    """Raises ValueError unless every number of a dataclass, and of those within it, is within the limits of its field.

    It names the field, the value and the limits.
    """
    kind: Any = type(config)
    for name, limits in _limits_of(kind).items():
        value = getattr(config, name)
        if is_dataclass(value):
            require_allowed(value)
        for number in _numbers(value):
            if not _is_allowed(number, limits):
                raise ValueError(f"{name.replace('_', ' ')} {number} is not allowed: give {_in_words(limits, number)}")


class Limited:
    """A dataclass whose numbers are within the limits of their fields: else making one raises ValueError."""

    __slots__ = ()

    def __post_init__(self) -> None:
        require_allowed(self)


@cache
def _limits_of(kind: Any) -> dict[str, Meta]:
    """The limits of each field; without any where its type has none."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: next(_metas(hints[name]), Meta()) for name in kind.__dataclass_fields__}


def _metas(hint: Any) -> Iterator[Meta]:
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(part, Meta):
            yield part
        elif get_args(part):
            yield from _metas(part)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)


def _is_allowed(number: float, limits: Meta) -> bool:
    return _is_held(number) and (
        (limits.ge is None or number >= limits.ge)
        and (limits.gt is None or number > limits.gt)
        and (limits.le is None or number <= limits.le)
        and (limits.lt is None or number < limits.lt)
    )


def _is_held(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) <= MAX_INTEGER
    return math.isfinite(number) and (number == 0 or LEAST_FLOAT <= abs(number) <= MAX_FLOAT)


def _in_words(limits: Meta, number: float) -> str:
    """`at least 1 and at most 64`, and what any number of its kind must be, if it is not."""
    bounds = {"at least": limits.ge, "more than": limits.gt, "at most": limits.le, "less than": limits.lt}
    words = " and ".join(f"{word} {bound:.12g}" for word, bound in bounds.items() if bound is not None)
    if _is_held(number) or limits.le is not None or limits.lt is not None:
        return words
    held = "an integer of 64 bits" if isinstance(number, int) else f"0, or of a size from {LEAST_FLOAT} to {MAX_FLOAT}"
    return f"{words} ({held})" if words else held
