"""What both writers are: samples are appended in order, and the writing can be continued after any kind of death."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.formats.row_file import RowFile

ReadBytes = Callable[[int, int], memoryview | bytes]
"""(offset, size) → these bytes of whatever the samples are copied from."""


class SampleWriter(ABC):
    """Writes the images of one split. What it writes depends on the samples alone, not on when it was interrupted."""

    @abstractmethod
    def write(self, rows: NDArray[np.void], read: ReadBytes) -> None:
        """Append samples. `rows` (ROW [M]): on entry `offset` is where `read` finds each; on return `offset` and
        `shard` are where each lies in the files.
        """

    @abstractmethod
    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk; what is returned (JSON) makes a new writer continue from here."""

    @abstractmethod
    def finish(self, rows: RowFile) -> list[Path]:
        """Complete the files; all samples are `rows`, whose offsets may change. Returns the files in order.

        May be called again, after a `sync`, if it was interrupted.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back the file descriptors."""

    @abstractmethod
    def descriptors(self) -> list[int]:
        """Open file descriptors, which a forked worker closes."""
