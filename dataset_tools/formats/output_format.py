"""What an output format of `convert` is: a row of `formats.formats.FORMATS`, and a writer that can be continued."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import ByteFile
from dataset_tools.formats.records import SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest

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
    def sync(self) -> None:
        """Bring everything to the disk."""

    @abstractmethod
    def finish(self, rows: RowFile) -> list[Path]:
        """Complete the files; all samples are `rows`, whose offsets may change. Returns the files in order.

        May be called again, also by a writer that continues these files, if it or what follows was interrupted.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


class OutputFormat(ABC):
    """How `convert` lays the images of a split on disk."""

    title: ClassVar[str]
    """Its name in a sentence."""
    extension: ClassVar[str]
    """Of its image files, with the dot."""
    lossless: ClassVar[int]
    """How what is no JPEG is stored without loss: RAW or PNG of formats.records."""
    default_order: ClassVar[str]
    """The order of samples: source or shuffled."""
    default_max_side: ClassVar[int | None] = None
    """Pixels; None: no limit."""
    sample_overhead_bytes: ClassVar[int]
    """An upper bound of what a sample takes beside its image, in all files."""
    hash_block_bytes: ClassVar[int | None] = None
    """The length of the blocks in which its image files are hashed: see FileEntry."""
    has_shards: ClassVar[bool] = False
    """Whether --shard-size means something."""
    decodes_into_buffers: ClassVar[bool] = False
    """Whether its stock decoders allocate as much for every image as for the largest."""

    def file_names(self, split: str, num_files: int) -> list[str]:
        """What the files of a finished split are called, in order, where it has `num_files`."""
        return [f"{split}{self.extension}"]

    def page_bytes(self, max_side: int | None) -> int | None:
        """The page size for images of up to `max_side` pixels, uncompressed; None: the format has no pages."""
        return None

    @abstractmethod
    def writer(
        self,
        folder: Path,
        split: str,
        *,
        num_reserved: int,
        page_bytes: int | None,
        shard_bytes: int,
        rows: RowFile,
    ) -> SampleWriter:
        """Begins the files of a split of at most `num_reserved` samples, or continues behind those that `rows` has.

        Raises ValueError or OSError if the files do not hold these.
        """

    def settled_page_bytes(self, files: Sequence[Path]) -> int | None:
        """The page size of finished files; None: the format has no pages."""
        return None

    @abstractmethod
    def problems(self, folder: Path, manifest: SplitManifest, records: SampleRecords) -> Iterator[str]:
        """A sentence for whatever in headers, tables and indices of a split is not what its records say."""

    def sample_problems(self, file: ByteFile, row: np.void) -> Iterator[str]:
        """A sentence for whatever is damaged around the image `row` in its file. Raises OSError."""
        yield from ()
