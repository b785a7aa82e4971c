"""A folder of images: [split/]CLASS/**/name.ext."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.files import read_file
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.layout import first_few, is_hidden, is_image, label_by_name, lay_out
from dataset_tools.sources.split import ImageSource, Split
from dataset_tools.sources.tar_archive import TAR_NAME, looks_like, open_tar_folder


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
        path = os.path.join(self.root, name)
        try:
            return read_file(path)
        except OSError as error:
            what = str(error.strerror or error).replace(f"{path}: ", "").replace(path, "it")
            reason = f"cannot read sample {name!r} of {self.root}: {what}"
            raise type(error)(error.errno, reason) from error

    def will_need(self, index: int) -> None:
        with suppress(OSError):
            file = os.open(os.path.join(self.root, self.names[index]), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def open_image_folder(root: Path) -> ImageSource:
    """All images below `root`, in the order of torchvision's ImageFolder (of each split folder).

    Where there are tars instead of images, these are opened (`open_tar_folder`). Raises ValueError if there is neither
    (see `layout.lay_out`), OSError if a folder cannot be read.
    """
    account = Account()
    files, others = {}, list[str]()
    for folder, inside in scan(root, account):
        files[folder] = PackedNames(filter(is_image, inside))
        others += [os.path.join(folder, name) for name in inside if not is_image(name)]
    tars = [name for name in others if TAR_NAME.fullmatch(os.path.basename(name))]
    if tars and not any(map(len, files.values())):
        account.leave_out_by_extension(set(others).difference(tars))
        return open_tar_folder(root, tars, account)
    account.leave_out_by_extension(others)
    if tars:
        account.notes.append(
            f"{root} holds images and {len(tars):,} tars, which are not read: {first_few(tars)}. Unpack them, or take "
            "them away"
        )
    if what := looks_like(others):
        account.notes.append(f"{root}:{what}")
    layout = lay_out({folder: len(names) for folder, names in files.items()}, f"the folder {root}", account)
    found: dict[str, tuple[PackedNames, NDArray[np.int64]]] = {}
    for split, folders in layout.splits.items():
        packed = [(folder, files[f"{layout.top}{folder}".rstrip("/")]) for folder, _ in folders]
        names = PackedNames(f"{folder}/{name}".lstrip("/") for folder, each in packed for name in each)
        labels = np.repeat([label for _, label in folders], [len(each) for _, each in packed]).astype(np.int64)
        found[split] = names, labels
    labels_of, classes = label_by_name(found, layout.classes)
    place = root / layout.top
    splits: dict[str, Split] = {
        split: FolderSplit(split, place, names, labels_of[split], classes) for split, (names, _) in found.items()
    }
    return ImageSource(path=root, kind="image folder", splits=splits, classes=classes, account=account)


def scan(root: Path, account: Account, depth: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root` (path relative to it, "" itself), to that `depth`, and the sorted names of the files
    right inside; `account` notes what is hidden.

    A folder is visited once, by itself rather than through a link, however many links lead to it.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        is_link = not waiting
        folder = links.pop(0) if is_link else waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            account.notes.append(f"the link {path} leads to a folder that is read already, and is not followed")
            continue
        seen.add(identity)
        names: list[str] = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                inside = os.path.join(folder, entry.name)
                if is_hidden(entry.name):
                    account.leave_out("hidden", inside)
                elif not _is_folder(entry):
                    names.append(entry.name)
                elif depth is None or inside.count("/") + 1 < depth:
                    (links if entry.is_symlink() else waiting).append(inside)
        yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
