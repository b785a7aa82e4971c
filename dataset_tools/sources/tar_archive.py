"""A tar of images, plain or compressed: [top/][split/]CLASS/**/name.ext."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.byte_file import ByteFile
from dataset_tools.sources.layout import SPLIT_NAMES, lay_out
from dataset_tools.sources.split import ImageSource, Split
from dataset_tools.sources.spool import compression, plain_tar
from dataset_tools.sources.tar_index import END_OF_ARCHIVE, DamagedArchiveError


class TarSplit(Split):
    """Images inside one uncompressed tar. Memory: the path and 32 bytes for each."""

    def __init__(
        self,
        name: str,
        tar: ByteFile,
        names: PackedNames,
        extents: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
    ) -> None:
        """`extents` int64 [N, 2]: offset and size, in bytes, of each image in the tar."""
        self.name, self.tar, self.names, self.extents = name, tar, names, extents
        self.labels, self.classes = labels, classes

    def read(self, index: int) -> bytes:
        offset, size = map(int, self.extents[index])
        return self.tar.read(offset, size, sample=self.names[index])


def open_tar(archive: Path) -> ImageSource:
    """All images of a tar (plain, gz, bz2 or xz), in the order that the same files in a folder would have.

    One top-level folder around everything is looked through. Links and files that are no image are skipped,
    so a class without images is unknown here. Raises ValueError if the file is no such tar, is damaged, holds
    a name twice or an absolute or `..` path, or for its layout (`layout.lay_out`).
    """
    _check_kind(archive)
    try:
        tar, index = plain_tar(archive)
    except DamagedArchiveError as error:
        raise ValueError(f"the archive {archive} cannot be used: {error}") from error
    ranges = index.folders()
    top = _common_top(list(ranges))
    layout = lay_out({folder[len(top) :]: stop - start for folder, (start, stop) in ranges.items()}, f"{archive}")
    file, splits = ByteFile(tar), dict[str, Split]()
    for split, folders in layout.splits.items():
        spans = [ranges[f"{top}{folder}".rstrip("/")] for folder, _ in folders]
        chosen = np.concatenate([np.arange(start, stop) for start, stop in spans])
        labels = np.repeat([label for _, label in folders], [stop - start for start, stop in spans]).astype(np.int64)
        names = PackedNames(index.names[position][len(top) :] for position in chosen)
        extents = np.stack([index.offsets[chosen], index.sizes[chosen]], axis=1)
        splits[split] = TarSplit(split, file, names, extents, labels, layout.classes)
    return ImageSource(path=archive, kind="tar", splits=splits, classes=layout.classes)


def _check_kind(archive: Path) -> None:
    with open(archive, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if compression(head) or head[257:262] == b"ustar" or head == END_OF_ARCHIVE:
        return
    try:  # a tar from before 1988 has no mark, but a checksum
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        what = "is empty" if not head else "is no tar"
        raise ValueError(
            f"the file {archive} {what}. A file must be a tar, plain or packed with gzip, bzip2 or xz; "
            "unpack other archives (zip, zstd) into a folder and give that."
        ) from error


def _common_top(folders: list[str]) -> str:
    """The folder around all images, with "/" at its end; "" if there is none, or if it is a split or a class."""
    tops = {folder.split("/")[0] for folder in folders}
    if len(tops) != 1 or not all("/" in folder for folder in folders) or tops & SPLIT_NAMES.keys():
        return ""
    return f"{tops.pop()}/"
