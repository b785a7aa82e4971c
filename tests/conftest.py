"""What all tests share: the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that LEOCLR_TEST_DATA names, with the real archives."""
    named = os.environ.get("LEOCLR_TEST_DATA")
    if not named:
        pytest.skip("LEOCLR_TEST_DATA does not name the folder of real data")
    folder = Path(named)
    for name in ("cifar10-jpeg.tar.xz", "imagenet-sample-400.tar"):
        if not (folder / name).is_file():
            pytest.skip(f"LEOCLR_TEST_DATA={named} has no {name}")
    return folder
