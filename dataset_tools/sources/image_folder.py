"""A folder of images: [split/]CLASS/**/name.ext."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import read_file
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.layout import is_hidden, is_image, lay_out
from dataset_tools.sources.split import ImageSource, Split

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class FolderSplit(Split):
    """Images that are files of their own. Memory: the relative path and 16 bytes for each."""

    name: str
    root: Path
    names: PackedNames
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def read(self, index: int) -> bytes:
        name = self.names[index]
        try:
            return read_file(os.path.join(self.root, name))
        except OSError as error:
            reason = f"cannot read sample {name!r} of {self.root}: {error.strerror or error}"
            raise type(error)(error.errno, reason) from error


def open_image_folder(root: Path) -> ImageSource:
    """All images below `root`, in the order of torchvision's ImageFolder (of each split folder).

    Raises ValueError if there is none (see `layout.lay_out`), OSError if a folder cannot be read.
    """
    files = {folder: PackedNames(names) for folder, names in scan(root)}
    layout = lay_out({folder: len(names) for folder, names in files.items()}, f"the folder {root}")
    splits: dict[str, Split] = {}
    for split, folders in layout.splits.items():
        names = PackedNames(f"{folder}/{name}".lstrip("/") for folder, _ in folders for name in files[folder])
        labels = np.repeat([label for _, label in folders], [len(files[folder]) for folder, _ in folders])
        splits[split] = FolderSplit(split, root, names, labels.astype(np.int64), layout.classes)
    return ImageSource(path=root, kind="image folder", splits=splits, classes=layout.classes)


def scan(
    root: Path, is_wanted: Callable[[str], bool] = is_image, depth: int | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root` (path relative to it, "" itself), to that `depth`, and the sorted names of the files
    right inside that `is_wanted`, not hidden ones.

    Follows links, except one that leads back to a folder it is inside of.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            logger.warning("the link %s leads back to a folder it is in, and is not followed", path)
            continue
        names: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if not _is_folder(entry):
                    names += [entry.name] if is_wanted(entry.name) else []
                elif depth is None or len(above) + 1 < depth:
                    waiting.append((f"{folder}/{entry.name}" if folder else entry.name, above | {identity}))
        yield folder, sorted(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
