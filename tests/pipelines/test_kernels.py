"""Numba's cache on the disk, with a function that is compiled at once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.core import caching

from pipelines.kernels import compile_by_numba


def write_42(output: Any) -> None:
    output[0] = 42.0


def hits_of_a_run() -> int:
    kernel: Any = compile_by_numba(write_42, types.void(types.float32[::1]), "the test")
    output = np.zeros(1, dtype=np.float32)
    kernel(output)
    assert output[0] == 42
    return sum(kernel.stats.cache_hits.values())


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))


def test_a_second_process_compiles_nothing() -> None:
    assert [hits_of_a_run() for _ in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("owner", "method", "number"),
    [
        (caching._CacheLocator, "ensure_cache_path", errno.EROFS),
        (caching.IndexDataCacheFile, "save", errno.ENOSPC),
    ],
)
def test_a_disk_that_cannot_be_written_to(
    owner: type, method: str, number: int, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(owner, method, fails)
    assert hits_of_a_run() == 0
    assert "numba's cache is out of use" in package_log.text
