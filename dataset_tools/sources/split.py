"""What every source looks like from outside: `ImageSource` and its `Split`s."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataset_tools.account import Account
from dataset_tools.files import ByteFile, raise_if_of_machine
from dataset_tools.packed_names import PackedNames

SPLIT_ORDER = ("train", "val", "test", "unlabeled")
UNLABELED = -1


def split_rank(name: str) -> tuple[int, str]:
    """What splits are sorted by: SPLIT_ORDER, then others by name."""
    return (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER)), name


class RottenImageError(OSError):
    """An image whose bytes are not those that were once written."""


class Split(ABC):
    """N encoded images with labels and names, in a fixed order.

    `labels` int64 [N], ranks in `classes`, or -1 where there is no label; `names` are paths inside the source
    ("train/cat/0001.jpg"), unique. Splits can be pickled, forked and read from several threads at once.
    """

    name: str
    labels: NDArray[np.int64]
    names: PackedNames
    classes: tuple[str, ...]

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image (JPEG, PNG …). Raises OSError, naming the sample, if it is gone or cut short."""

    def will_need(self, index: int) -> None:  # noqa: B027 - a hint
        """This image will be read soon: the system may fetch it from the disk. Raises nothing."""

    def check(self) -> None:  # noqa: B027 - few sources have something to check
        """Looks at what is kept of every image: whoever reads many calls it first. Raises ValueError for damage."""

    def read_checked(self, index: int) -> bytes:
        """As `read`; where the source knows what the bytes were, raises RottenImageError if they are others now."""
        return self.read(index)

    def subset(self, indices: ArrayLike) -> Split:
        """A view of the samples at `indices` (integers [M], in [0, N), distinct or not), in that order."""
        return SubsetSplit(self, np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)


class SubsetSplit(Split):
    """Some samples of another split. Memory: the name and 24 bytes for each."""

    def __init__(self, parent: Split, indices: NDArray[np.int64]) -> None:
        self.parent, self.indices = parent, indices
        self.name, self.classes = parent.name, parent.classes
        self.labels = parent.labels[indices]
        self.names = parent.names.select(indices)

    def read(self, index: int) -> bytes:
        return self.parent.read(int(self.indices[index]))

    def will_need(self, index: int) -> None:
        self.parent.will_need(int(self.indices[index]))

    def check(self) -> None:
        self.parent.check()

    def read_checked(self, index: int) -> bytes:
        return self.parent.read_checked(int(self.indices[index]))


@dataclass(eq=False, repr=False)
class ExtentSplit(Split):
    """Images that are pieces of files, read by position. Memory: the name and 32 or 36 bytes for each."""

    name: str
    files: tuple[ByteFile, ...]
    names: PackedNames
    extents: NDArray[np.int64]
    """int64 [N, 2]: offset and size, in bytes, of each image in its file."""
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    file_of: NDArray[np.int32] | None = None
    """int32 [N]: in which of the files each image is; None: there is one."""

    def read(self, index: int) -> bytes:
        offset, size = map(int, self.extents[index])
        file = self.files[0 if self.file_of is None else self.file_of[index]]
        return file.read(offset, size, sample=self.names[index])


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A data set: its splits and the one class list they share."""

    path: Path
    kind: str
    """What was recognised: "image folder", "tar", "tar of tars", "webdataset tar", "folder of tars", "ILSVRC2012",
    "Parquet", "CIFAR-10", "CIFAR-100", "STL-10"."""
    splits: dict[str, Split]
    """In the order train, val, test, unlabeled; only those that hold images."""
    classes: tuple[str, ...]
    """Sorted by name. Empty if nothing is labelled."""
    account: Account = field(default_factory=Account)
    """What was not read."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over split names, sample names and labels, not over the images: is this the same data?"""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            digest.update(f"{name} {len(split)}\n".encode())
            digest.update(split.names.blob)
            digest.update(split.names.offsets.astype("<i8").tobytes())
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, name: str) -> Split:
        """Raises ValueError if there is no split of this name."""
        if name not in self.splits:
            raise ValueError(f"there is no split {name!r} in {self.path}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def sample_digest(self, per_split: int = 16) -> str:
        """SHA-256 (hex) over the bytes of a few images of each split, the same ones everywhere: are these the same
        files? Of an image that cannot be read there are no bytes."""
        digest = hashlib.sha256()
        for split in self.splits.values():
            for index in np.linspace(0, len(split) - 1, min(per_split, len(split))).astype(int).tolist():
                try:
                    content = split.read(index)
                except OSError as error:
                    raise_if_of_machine(error)
                    content = b""
                digest.update(f"{index} {len(content)}\n".encode())
                digest.update(content)
        return digest.hexdigest()

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        return f"{self.kind} {self.path} ({sizes}; {len(self.classes)} classes)"

    def describe(self) -> list[str]:
        """One line, or two: splits and classes as they were understood, and what is not read."""
        some = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        unlabelled = []
        for name, split in self.splits.items():
            if count := int((split.labels == UNLABELED).sum()):
                unlabelled.append(name if count == len(split) else f"{count:,} of {name}")
        labels = f"{len(self.classes):,} classes ({some})" if self.classes else "no labels"
        if self.classes and unlabelled:
            labels += f"; {', '.join(unlabelled)} without labels"
        sizes = ", ".join(f"{name} {len(split):,} images" for name, split in self.splits.items())
        return [f"{self.path} ({self.kind}): {sizes}; {labels}", *filter(None, [str(self.account)])]
