"""Tests of what needs a package that may be missing are skipped, and say which."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
HAS_FFCV = find_spec("ffcv") is not None

needs_dali = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed: pip install 'leoclr-fast[dali]'")
needs_ffcv = pytest.mark.skipif(
    not HAS_FFCV, reason="FFCV is not installed: make ffcv, or pip install 'leoclr-fast[ffcv]'"
)
