"""Where the images of an uncompressed tar are."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import save_arrays
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
    extents: NDArray[np.int64]
    """int64 [N, 2]: where the bytes of an image begin in the tar, and how many they are."""
    folders: dict[str, tuple[int, int]]
    """Each folder that holds images → the range [start, stop) of them, in order."""

    @classmethod
    def build(cls, tar: Path) -> TarIndex:
        """Reads all headers (GNU and PAX long names and sizes, too), about 40,000 a second.

        The images of a tar of tars (see `is_tar_of_tars`) are named "train/STEM OF THE INNER TAR/name".
        Raises DamagedArchiveError if the tar, or one inside, is cut short or damaged, holds a name twice, or
        an absolute or `..` path.
        """
        offsets, folder_of, numbers = array("q"), array("i"), dict[str, int]()

        def read_names() -> Iterator[str]:
            for name, offset, size in _nested_images(tar) if is_tar_of_tars(tar) else _images(tar):
                folder_of.append(numbers.setdefault(os.path.dirname(name), len(numbers)))
                offsets.extend((offset, size))
                yield name

        names = PackedNames(read_names())
        extents = np.frombuffer(offsets, dtype=np.int64).reshape(-1, 2)
        by_folder = np.argsort(np.frombuffer(folder_of, dtype=np.int32), kind="stable")
        stops = np.cumsum(np.bincount(folder_of, minlength=len(numbers)))
        order, folders, start = np.empty_like(by_folder), dict[str, tuple[int, int]](), 0
        for folder in sorted(numbers):
            number = numbers[folder]
            inside = by_folder[stops[number - 1] if number else 0 : stops[number]].tolist()
            inside.sort(key=names.__getitem__)
            for name, following in pairwise(map(names.__getitem__, inside)):
                if name == following:
                    raise DamagedArchiveError(f"it holds {name!r} more than once; keep one of them.")
            folders[folder] = start, start + len(inside)
            order[start : start + len(inside)] = inside
            start += len(inside)
        del by_folder
        if (order[1:] < order[:-1]).any():
            extents = extents[order]  # one after the other, so that only one of them is there twice
            names = names.select(order)
        return cls(names, extents, folders)

    def save(self, path: Path) -> None:
        """Writes an .npz without pickles; atomic."""
        ranges = np.array(list(self.folders.values()), dtype=np.int64).reshape(-1, 2)
        named = self.names.as_arrays("names") | PackedNames(self.folders).as_arrays("folders")
        save_arrays(path, named | {"extents": self.extents, "ranges": ranges})

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """The inverse of `save`. Raises OSError, EOFError, ValueError, KeyError or zipfile.BadZipFile."""
        with np.load(path, allow_pickle=False) as saved:
            names, extents = PackedNames.from_arrays(saved, "names"), saved["extents"]
            folders = dict(
                zip(PackedNames.from_arrays(saved, "folders"), map(tuple, saved["ranges"].tolist()), strict=True)
            )
        if extents.shape != (len(names), 2):
            raise ValueError(f"{path} is inconsistent")
        return cls(names, extents, folders)


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def is_tar_of_tars(tar: Path) -> bool:
    """Whether all regular files of a tar are tars by their names, as in ILSVRC2012_img_train.tar.

    Reads headers up to the first that is none. Raises DamagedArchiveError like `TarIndex.build`.
    """
    parts = None
    with open(tar, "rb") as file:
        for parts, _ in _members(file, 0, tar.stat().st_size):
            if not is_tar(parts[-1]):
                return False
    return parts is not None


def _images(tar: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each image, in the order of the archive."""
    with open(tar, "rb") as file:
        for parts, member in _members(file, 0, tar.stat().st_size):
            if is_image(parts[-1]):
                yield "/".join(parts), member.offset_data, member.size


def _nested_images(tar: Path) -> Iterator[tuple[str, int, int]]:
    """The same for a tar of tars; the offsets count from the beginning of the outer one."""
    stems: set[str] = set()
    with open(tar, "rb") as file:
        for outer, inner in _members(file, 0, tar.stat().st_size):
            stem = outer[-1][: -len(".tar")]
            if stem in stems:
                raise DamagedArchiveError(f"it holds {outer[-1]!r} more than once; keep one of them.")
            stems.add(stem)
            images = 0
            try:
                for parts, member in _members(file, inner.offset_data, inner.offset_data + inner.size):
                    if is_image(parts[-1]):
                        yield f"train/{stem}/{'/'.join(parts)}", member.offset_data, member.size
                        images += 1
            except DamagedArchiveError as error:
                raise DamagedArchiveError(f"in its member {inner.name!r}: {error}") from error
            if not images:
                raise DamagedArchiveError(f"its member {inner.name!r} holds no image.")


def _members(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[list[str], tarfile.TarInfo]]:
    """The regular, visible files of the tar that lies at bytes [start, stop) of `file`: the parts of the name
    (one at least), and the rest. Raises DamagedArchiveError.
    """
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None and member.offset < stop:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps 1 kB for each
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.name.startswith("/") or ".." in parts:
                    raise DamagedArchiveError(
                        f"its member {member.name!r} has an absolute or `..` path, which is refused."
                    )
                if member.offset_data + (member.size if member.isreg() else 0) > stop:
                    raise DamagedArchiveError(f"it is damaged or cut short: {member.name!r} goes on behind the end")
                if not member.isreg() or not parts or any(map(is_hidden, parts)):
                    continue
                if member.issparse() and (is_image(parts[-1]) or is_tar(parts[-1])):
                    raise DamagedArchiveError(
                        f"its member {member.name!r} is a sparse file; create the tar without --sparse."
                    )
                yield parts, member
            end = archive.offset if member is None else member.offset
    except tarfile.TarError as error:
        raise DamagedArchiveError(f"it is damaged or cut short: {error}") from error
    file.seek(end)  # tarfile also ends, silently, at a damaged header
    block = file.read(min(tarfile.BLOCKSIZE, max(0, stop - end)))
    if block != END_OF_ARCHIVE:
        what = "a damaged header" if block else "the end of the file without the end-of-archive mark"
        raise DamagedArchiveError(f"it is damaged or cut short: {what} at byte {end}")
