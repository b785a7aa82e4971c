"""The fused augmentation: in Triton's interpreter, compiled for GPUs that are not here, and chosen or refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.augment import augment
from pipelines.config import ViewConfig
from tests.pipelines.test_augment import parameters, pictures
from tests.triton_processes import assert_compiles_without_spills, assert_passes_in_the_interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


@pytest.mark.parametrize(
    ("marked", "at_least"),
    [("not long", 45), pytest.param("long", 10, marks=[pytest.mark.long, pytest.mark.timeout(1500)])],
)
def test_in_the_interpreter(marked: str, at_least: int) -> None:
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_augment.py"), marked, at_least)


@pytest.mark.parametrize("sizes", ["augment", pytest.param("augment_odd", marks=pytest.mark.long)])
def test_it_compiles_ahead_of_time_without_spills(sizes: str, tmp_path: Path) -> None:
    assert_compiles_without_spills(sizes, {"sum_grays", "colour", "blur_rows", "blur_columns"}, tmp_path)


def test_a_cpu_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"triton cannot augment here, since the crops are on cpu, .* choose impl"):
        augment(pictures(2, 32), parameters(2), ViewConfig(image_size=32), impl="triton")
