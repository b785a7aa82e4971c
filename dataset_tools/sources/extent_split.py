"""Images that are pieces of one file: of a tar, or of a blob in the cache folder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.byte_file import ByteFile
from dataset_tools.sources.split import Split


class ExtentSplit(Split):
    """Images inside one file, read by position. Memory: the name and 32 bytes for each."""

    def __init__(
        self,
        name: str,
        file: ByteFile,
        names: PackedNames,
        extents: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
    ) -> None:
        """`extents` int64 [N, 2]: offset and size, in bytes, of each image in the file."""
        self.name, self.file, self.names, self.extents = name, file, names, extents
        self.labels, self.classes = labels, classes

    def read(self, index: int) -> bytes:
        offset, size = map(int, self.extents[index])
        return self.file.read(offset, size, sample=self.names[index])
