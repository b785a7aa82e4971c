"""The resize for GPUs: in Triton's interpreter, compiled for GPUs that are not here, and chosen or refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipelines.crop_resize import crop_resize
from tests.pipelines.pictures import picture
from tests.pipelines.test_crop_resize import pack

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("marked", "at_least"),
    [("not long", 35), pytest.param("long", 25, marks=[pytest.mark.long, pytest.mark.timeout(1500)])],
)
def test_in_the_interpreter(marked: str, at_least: int) -> None:
    tests = Path(__file__).with_name("interpreted_crop_resize.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("sizes", ["crop_resize", pytest.param("crop_resize_odd", marks=pytest.mark.long)])
def test_it_compiles_ahead_of_time_without_spills(sizes: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leoclr_fast.bench.ahead_of_time", sizes]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, check=True, timeout=280, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = json.loads(done.stdout)["rows"]
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (f"crop_resize_{kernel}", target)
        for kernel in ("weights", "rows", "columns")
        for target in ("sm_80", "sm_90", "sm_100")
    }
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert all(16 <= row["registers"] <= 255 for row in rows)


def test_a_cpu_without_the_interpreter() -> None:
    boxes = np.array([[0, 0, 4, 4]], dtype=np.int32)
    with pytest.raises(ValueError, match=r"triton cannot resize here, since the images are on cpu, .* choose impl"):
        crop_resize(pack(picture(4, 4)), np.array([0]), boxes, 8, impl="triton")
