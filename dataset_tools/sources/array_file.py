"""Named arrays in one file of the cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an .npz, which appears whole or not at all; `numpy.load` reads it. No array may hold objects."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        named: dict[str, Any] = dict(arrays)
        np.savez(file, **named)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
