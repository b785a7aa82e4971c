"""The resize for GPUs: in Triton's interpreter, compiled for GPUs that are not here, and chosen or refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipelines.crop_resize import crop_resize
from tests.pipelines.pictures import picture
from tests.pipelines.test_crop_resize import pack
from tests.triton_processes import assert_compiles_without_spills, assert_passes_in_the_interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


@pytest.mark.parametrize(
    ("marked", "at_least"),
    [("not long", 35), pytest.param("long", 25, marks=[pytest.mark.long, pytest.mark.timeout(1500)])],
)
def test_in_the_interpreter(marked: str, at_least: int) -> None:
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_crop_resize.py"), marked, at_least)


@pytest.mark.parametrize("sizes", ["crop_resize", pytest.param("crop_resize_odd", marks=pytest.mark.long)])
def test_it_compiles_ahead_of_time_without_spills(sizes: str, tmp_path: Path) -> None:
    assert_compiles_without_spills(sizes, {"crop_resize_weights", "crop_resize_rows", "crop_resize_columns"}, tmp_path)


def test_a_cpu_without_the_interpreter() -> None:
    boxes = np.array([[0, 0, 4, 4]], dtype=np.int32)
    with pytest.raises(ValueError, match=r"triton cannot resize here, since the images are on cpu, .* choose impl"):
        crop_resize(pack(picture(4, 4)), np.array([0]), boxes, 8, impl="triton")
