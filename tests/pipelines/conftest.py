"""What the tests of the data layer share: the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that LEOCLR_TEST_DATA names."""
    named = os.environ.get("LEOCLR_TEST_DATA")
    if not named:
        pytest.skip("LEOCLR_TEST_DATA does not name the folder of real data")
    folder = Path(named)
    if not (folder / "imagenet-sample-400.tar").is_file():
        pytest.skip(f"LEOCLR_TEST_DATA={named} has no imagenet-sample-400.tar")
    return folder
