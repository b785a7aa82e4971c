"""The Triton kernels of the views, where there is no GPU: in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.triton_processes import assert_compiles_and_fits, assert_passes_in_the_interpreter, compilations

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


@pytest.mark.parametrize(
    ("marked", "at_least"),
    [("not long", 90), pytest.param("long", 23, marks=[pytest.mark.long, pytest.mark.timeout(3000)])],
)
def test_each_implementation(marked: str, at_least: int) -> None:
    """What is asked of every implementation, in one process for both operations."""
    files = [Path(__file__).with_name(name) for name in ("test_augment.py", "test_crop_resize.py")]
    names = "TestEachImplementation or TestInterpreted or test_any_scratch"
    assert_passes_in_the_interpreter(files, marked, at_least, names)


@pytest.mark.parametrize(("sizes", "targets"), compilations("augment"))
def test_the_augmentation_fits(sizes: str, targets: tuple[int, ...], tmp_path: Path) -> None:
    assert_compiles_and_fits(sizes, {"sum_grays", "colour", "blur_rows", "blur_columns"}, tmp_path, targets)


@pytest.mark.parametrize(("sizes", "targets"), compilations("crop_resize"))
def test_the_resize_fits(sizes: str, targets: tuple[int, ...], tmp_path: Path) -> None:
    kernels = {"crop_resize_weights", "crop_resize_rows", "crop_resize_columns"}
    assert_compiles_and_fits(sizes, kernels, tmp_path, targets)
