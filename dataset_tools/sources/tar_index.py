"""Where the images of an uncompressed tar are."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.layout import is_hidden, is_image

END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


class DamagedArchiveError(ValueError):
    """The archive cannot be read as it is. The message says why; it does not name the archive."""


@dataclass(frozen=True)
class TarIndex:
    """The N images of a tar, sorted by folder, then by file name. Memory: the name and 24 bytes for each."""

    names: PackedNames
    """Paths, without "./" at the front."""
    offsets: NDArray[np.int64]
    """int64 [N]: where the bytes of an image begin in the tar."""
    sizes: NDArray[np.int64]
    """int64 [N]: how many bytes they are."""

    @classmethod
    def build(cls, tar: Path) -> TarIndex:
        """Reads all headers (GNU and PAX long names and sizes, too), about 40,000 a second.

        Raises DamagedArchiveError if the tar is cut short or damaged, holds a name twice, or an absolute or
        `..` path.
        """
        offsets, sizes = array("q"), array("q")
        in_folder: dict[str, array[int]] = defaultdict(lambda: array("q"))

        def names() -> Iterator[str]:
            for name, offset, size in _images(tar):
                in_folder[os.path.dirname(name)].append(len(offsets))
                offsets.append(offset)
                sizes.append(size)
                yield name

        try:
            packed = PackedNames(names())
        except tarfile.TarError as error:
            raise DamagedArchiveError(f"it is damaged or cut short: {error}") from error
        order = array("q")
        for _, positions in sorted(in_folder.items()):
            order.extend(sorted(positions, key=packed.__getitem__))
        chosen = np.array(order, dtype=np.int64)
        index = cls(packed.select(chosen), np.array(offsets)[chosen], np.array(sizes)[chosen])
        index._refuse_duplicates()
        return index

    def _refuse_duplicates(self) -> None:
        previous = None
        for name in self.names:
            if name == previous:
                raise DamagedArchiveError(f"it holds {name!r} more than once; keep one of them.")
            previous = name

    def folders(self) -> dict[str, tuple[int, int]]:
        """Each folder that holds images → the range [start, stop) of them, in order."""
        ranges: dict[str, tuple[int, int]] = {}
        for position, name in enumerate(self.names):
            folder = os.path.dirname(name)
            ranges[folder] = (ranges.get(folder, (position, 0))[0], position + 1)
        return ranges

    def save(self, path: Path) -> None:
        """As an .npz without pickles; atomic."""
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            blob = np.frombuffer(self.names.blob, dtype=np.uint8)
            np.savez(file, blob=blob, ends=self.names.offsets, offsets=self.offsets, sizes=self.sizes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """The inverse of `save`. Raises OSError, EOFError, ValueError, KeyError or zipfile.BadZipFile."""
        with np.load(path, allow_pickle=False) as saved:
            names = PackedNames.from_buffers(saved["blob"].tobytes(), saved["ends"])
            index = cls(names, saved["offsets"], saved["sizes"])
        if not len(names) == len(index.offsets) == len(index.sizes):
            raise ValueError(f"{path} is inconsistent")
        return index


def _images(tar: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each image, in the order of the archive."""
    with tarfile.open(tar, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps 1 kB for each
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.name.startswith("/") or ".." in parts:
                raise DamagedArchiveError(f"its member {member.name!r} has an absolute or `..` path, which is refused.")
            if not member.isreg() or any(map(is_hidden, parts)) or not is_image(member.name):
                continue
            if member.issparse():
                raise DamagedArchiveError(
                    f"its member {member.name!r} is a sparse file; create the tar without --sparse."
                )
            yield "/".join(parts), member.offset_data, member.size
        end = archive.offset
    with open(tar, "rb") as file:  # tarfile also ends, silently, at a damaged header
        file.seek(end)
        if (block := file.read(tarfile.BLOCKSIZE)) != END_OF_ARCHIVE:
            what = "a damaged header" if block else "the end of the file without the end-of-archive mark"
            raise DamagedArchiveError(f"it is damaged or cut short: {what} at byte {end}")
