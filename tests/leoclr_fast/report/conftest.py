"""Tests of reports: runs write them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leoclr_fast.pages import runs_write_pages


@pytest.fixture(scope="module", autouse=True)
def _with_pages() -> Iterator[None]:
    with runs_write_pages(True):
        yield
