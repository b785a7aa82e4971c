"""The one rule for numbers of configs and flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from dataset_tools.limits import MAX_INTEGER, Count, require_allowed


@dataclass(frozen=True, kw_only=True)
class Inner:
    temperature: Annotated[float, Meta(ge=1e-4, le=1e4)] = 0.2
    rates: tuple[Annotated[float, Meta(gt=0)], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    max_images: Count | None = None
    free: float = 0.0
    switch: bool = False
    name: str = "nan"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(max_images=0), "max images 0 is not allowed: give at least 1"),
        (Outer(max_images=10**20), f"max images {10**20} is not allowed: give at least 1 (an integer of 64 bits)"),
        (Outer(free=math.inf), "free inf is not allowed: give 0, or of a size from 1e-37 to 1e+38"),
        (Outer(free=1e308), "free 1e+308 is not allowed: give 0, or of a size from 1e-37 to 1e+38"),
        (Outer(free=-1e-320), "free -1e-320 is not allowed"),
        (Outer(inner=Inner(temperature=math.nan)), "temperature nan is not allowed: give at least 0.0001 and at most"),
        (Outer(inner=Inner(rates=(0.1, 0.0))), "rates 0.0 is not allowed: give more than 0"),
        (Outer(inner=Inner(rates=(1e39,))), "rates 1e+39 is not allowed: give more than 0 (0, or of a size from 1e-37"),
    ],
)
def test_numbers_out_of_limits(config: Outer, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        require_allowed(config)
    assert str(caught.value).startswith(message)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(allow_nan=True, allow_infinity=True), st.integers())
def test_what_is_allowed_is_finite_and_has_64_bits(number: float, integer: int) -> None:
    try:
        require_allowed(Outer(free=number, max_images=integer))
    except ValueError:
        assert not (1 <= integer <= MAX_INTEGER and (number == 0 or 1e-37 <= abs(number) <= 1e38))
    else:
        assert 1 <= integer <= MAX_INTEGER
        assert abs(number) <= 1e38
