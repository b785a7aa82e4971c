"""A tar of images, plain or compressed: [top/][split/]CLASS/**/name.ext, or a tar of one tar for each class."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from dataset_tools.files import ByteFile
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.layout import SPLIT_NAMES, lay_out
from dataset_tools.sources.split import ExtentSplit, ImageSource, Split
from dataset_tools.sources.spool import compression, plain_tar
from dataset_tools.sources.tar_index import END_OF_ARCHIVE, DamagedArchiveError, TarIndex, is_tar_of_tars


def open_tar(archive: Path) -> ImageSource:
    """All images of a tar (plain, gz, bz2 or xz), in the order that the same files in a folder would have.

    One top-level folder around everything is looked through. Links and files that are no image are skipped,
    so a class without images is unknown here. A tar of plain tars (ILSVRC2012_img_train.tar) is read where it
    is, as if it were train/ with a folder for each inner tar. Raises ValueError if the file is no such tar, is
    damaged, holds a name twice or an absolute or `..` path, or for its layout (`layout.lay_out`).
    """
    tar, index = read_index(archive)
    top = _common_top(list(index.folders))
    ranges = {folder[len(top) :]: range(*bounds) for folder, bounds in index.folders.items()}
    layout = lay_out({folder: len(inside) for folder, inside in ranges.items()}, f"{archive}")
    file, splits = ByteFile(tar), dict[str, Split]()
    for split, folders in layout.splits.items():
        positions = np.concatenate([np.arange(*index.folders[top + folder]) for folder, _ in folders])
        labels = np.repeat([label for _, label in folders], [len(ranges[folder]) for folder, _ in folders])
        names = index.names.select(positions)
        if top:
            names = PackedNames(name[len(top) :] for name in names)
        splits[split] = ExtentSplit(
            split, file, names, index.extents[positions], labels.astype(np.int64), layout.classes
        )
    kind = "tar of tars" if is_tar_of_tars(tar) else "tar"
    return ImageSource(path=archive, kind=kind, splits=splits, classes=layout.classes)


def read_index(archive: Path) -> tuple[Path, TarIndex]:
    """The plain tar (a copy in the cache folder where `archive` is compressed) and where its images are.

    Raises ValueError, naming `archive`, if it is no tar or is damaged.
    """
    _check_kind(archive)
    try:
        return plain_tar(archive)
    except DamagedArchiveError as error:
        raise ValueError(f"the archive {archive} cannot be used: {error}") from error


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
            f"the file {archive} {what}. A file must be a tar, plain or packed with gzip, bzip2 or xz, or "
            "Parquet; unpack other archives (zip, zstd) into a folder and give that."
        ) from error


def _common_top(folders: list[str]) -> str:
    """The folder around all images, with "/" at its end; "" if there is none, or if it is a split or a class."""
    tops = {folder.split("/")[0] for folder in folders}
    if len(tops) != 1 or not all("/" in folder for folder in folders) or tops & SPLIT_NAMES.keys():
        return ""
    return f"{tops.pop()}/"
