"""The fused augmentation: in Triton's interpreter, compiled for GPUs that are not here, and chosen or refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.augment import augment
from pipelines.config import ViewConfig
from tests.pipelines.test_augment import parameters, pictures

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("marked", "at_least"),
    [("not long", 45), pytest.param("long", 10, marks=[pytest.mark.long, pytest.mark.timeout(1500)])],
)
def test_in_the_interpreter(marked: str, at_least: int) -> None:
    tests = Path(__file__).with_name("interpreted_augment.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("sizes", ["augment", pytest.param("augment_odd", marks=pytest.mark.long)])
def test_it_compiles_ahead_of_time_without_spills(sizes: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leoclr_fast.bench.ahead_of_time", sizes]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, check=True, timeout=280, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = json.loads(done.stdout)["rows"]
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (kernel, target)
        for kernel in ("sum_grays", "colour", "blur_rows", "blur_columns")
        for target in ("sm_80", "sm_90", "sm_100")
    }
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert all(16 <= row["registers"] <= 255 for row in rows)


def test_a_cpu_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"triton cannot augment here, since the crops are on cpu, .* choose impl"):
        augment(pictures(2, 32), parameters(2), ViewConfig(image_size=32), impl="triton")
