"""Triton in processes of their own: its interpreter, and its compiler for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[1]


def assert_passes_in_the_interpreter(tests: Sequence[Path], marked: str, at_least: int, names: str) -> None:
    """Run files of tests with TRITON_INTERPRET=1: at least so many pass, none fails or is skipped.

    marked, names: pytest's `-m` and `-k`.
    """
    options = ["-p", "no:cacheprovider", "-m", marked, "-k", names]
    command = [sys.executable, "-m", "pytest", "-q", *options, *map(str, tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout


def compilations(sizes: str) -> list[Any]:
    """Parameters of a test, `sizes` and `targets`: an H200's code at the usual sizes; all others take minutes."""
    return [
        (sizes, (90,)),
        pytest.param(sizes, (80, 100), marks=pytest.mark.long),
        pytest.param(f"{sizes}_odd", (80, 90, 100), marks=pytest.mark.long),
    ]


def assert_compiles_and_fits(sizes: str, kernels: set[str], cache: Path, targets: Sequence[int]) -> None:
    """Compile these kernels, and no others, for GPUs of these compute capabilities: none spills, a block of each fits.

    sizes: which of `benchmarks.ahead_of_time`. cache: Triton's, an empty folder.
    """
    module = "benchmarks.ahead_of_time"
    code = f"import json; from {module} import compile_all; print(json.dumps(compile_all([{sizes!r}], {targets!r})))"
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, check=True, timeout=280, cwd=_ROOT, env=environment, capture_output=True, text=True)
    rows = json.loads(done.stdout)
    expected = {(kernel, target) for kernel in kernels for target in (f"sm_{number}" for number in targets)}
    assert {(row["kernel"], row["target"]) for row in rows} == expected
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert all(16 <= row["registers"] <= 255 for row in rows)
    largest = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # KiB of a block
    assert [
        row for row in rows if row["shared_bytes"] > 1024 * largest[row["target"]] or row["blocks_per_sm"] < 1
    ] == []
