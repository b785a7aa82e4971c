"""Tests of reports: runs write them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leoclr_fast.forked_runs import ForkedRuns, fork_server
from tests.leoclr_fast.pages import runs_write_pages


@pytest.fixture(scope="module", autouse=True)
def _with_pages() -> Iterator[None]:
    with runs_write_pages(True):
        yield


@pytest.fixture(scope="session")
def runs() -> Iterator[ForkedRuns]:
    with fork_server(pages=True) as server:
        yield server
