"""What a converted data set says about itself: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from msgspec import Meta, Struct

from dataset_tools.account import Account
from dataset_tools.files import raise_if_of_machine, write_file
from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.records import ROW
from dataset_tools.formats.split_manifest import Count, FileEntry, SplitManifest, check_split_name
from dataset_tools.schema import FileContentError, convert, decode_json, read_bounded

MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
VERSION = 1

Value: TypeAlias = str | int | float | bool | None
Facts: TypeAlias = dict[str, Value | list[dict[str, Value]]]
"""Of one data set; of one that `merge` made, {"merged": [those of its parts]} where they differ."""
Part: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A converted data set."""

    format: str
    """A key of FORMATS."""
    classes: tuple[str, ...]
    """Sorted; a label is the rank of its class."""
    splits: dict[str, SplitManifest]
    source: Facts
    """kind and fingerprint of what was converted."""
    options: Facts
    """Everything that the bytes of the result depend on."""
    versions: Facts
    quarantine: FileEntry
    """The list of the images that could not be used."""
    part: tuple[Part, Part] | None = None
    """(i, n): the i-th of n parts of each split, counted from 1."""
    account: Account = field(default_factory=Account)
    """What of the source was not read."""
    version: int = VERSION

    def __post_init__(self) -> None:
        """Raises ValueError for anything by which a path, or a number, would be made of what somebody wrote."""
        if self.format not in FORMATS or not self.splits:
            raise ValueError(f"format {self.format!r}, {len(self.splits)} splits")
        if self.part and self.part[0] > self.part[1]:
            raise ValueError(f"its part is {self.part[0]} of {self.part[1]}")
        if sum(split.quarantined for split in self.splits.values()) > self.quarantine.bytes:
            raise ValueError("it counts more images in quarantine than are listed")
        expected = [QUARANTINE_NAME]
        for name, split in self.splits.items():
            check_split_name(name)
            expected += [records_name(name), *FORMATS[self.format].file_names(name, len(split.files))]
            if split.samples * ROW.itemsize > split.records.bytes:
                raise ValueError(f"the records of {name} are too small for {split.samples:,} samples")
        for file, name in zip_longest((file.name for file in self.all_files), expected):
            if file != name:
                raise ValueError(f"{file!r} is the name of a file that is to be called {name!r}")

    @property
    def all_files(self) -> tuple[FileEntry, ...]:
        """Every file of the data set but the manifest."""
        return self.quarantine, *(file for split in self.splits.values() for file in split.all_files)

    def save(self, folder: Path) -> None:
        """Writes manifest.json, synced to the disk."""
        write_file(folder / MANIFEST_NAME, _text(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises FileNotFoundError if `folder` has no manifest, ValueError if it is damaged or of a newer version."""
        path = folder / MANIFEST_NAME
        if not os.path.lexists(path):
            raise FileNotFoundError(f"{folder} is no converted data set: it has no {MANIFEST_NAME}.")
        try:
            text = read_bounded(path)
            content = decode_json(text, dict[str, Any], "it")
            version = content.get("version")
            if isinstance(version, int) and version > VERSION:
                raise ValueError(
                    f"its version is {version}, and this program knows versions up to {VERSION}; update leoclr-fast"
                )
            content.pop("checksum", None)
            if text != _text(content).encode():
                raise ValueError("it was changed after it was written: its checksum is wrong")
            return convert(content, cls, "in it")
        except (ValueError, OSError, RecursionError) as error:
            if isinstance(error, OSError):
                raise_if_of_machine(error)
            raise FileContentError(f"{path} cannot be used: {str(error) or 'it is nested too deeply'}") from error


def require_files(folder: Path, files: Iterable[FileEntry]) -> None:
    """Raises FileNotFoundError for a file that is missing, ValueError for one that is cut."""
    for file in files:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} lacks {file.name}, which its manifest lists; delete it, and copy or convert it again"
            )
        if path.stat().st_size != file.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes and not {file.bytes:,}, as the manifest says; delete "
                f"{folder}, and copy or convert it again"
            )


def records_name(split: str) -> str:
    """The name of the file that holds what is known of each sample of a split."""
    return f"{split}.records.safetensors"


class QuarantinedImage(Struct):
    """A line of quarantine.jsonl: an image that could not be used."""

    split: str
    name: str
    index: Count
    reason: str


def read_quarantine(lines: bytes) -> list[QuarantinedImage]:
    """The content of quarantine.jsonl. Raises ValueError."""
    return [decode_json(line, QuarantinedImage, QUARANTINE_NAME) for line in lines.splitlines()]


def is_converted(folder: Path) -> bool:
    """Whether a folder is a converted data set, whole or damaged."""
    return os.path.lexists(folder / MANIFEST_NAME)


def _text(content: dict[str, Any]) -> str:
    """JSON with a checksum of the rest as its last entry, so that no damage goes unseen."""
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": checksum}, indent=1) + "\n"
