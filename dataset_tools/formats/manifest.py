"""What a converted data set says about itself: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataset_tools.files import write_file
from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.split_manifest import FileEntry, SplitManifest

MANIFEST_NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A converted data set."""

    format: str
    """A key of FORMATS."""
    classes: tuple[str, ...]
    """Sorted; a label is the rank of its class."""
    splits: dict[str, SplitManifest]
    source: dict[str, Any]
    """kind and fingerprint of what was converted."""
    options: dict[str, Any]
    """Everything that the bytes of the result depend on."""
    versions: dict[str, str]
    quarantine: FileEntry
    """The list of the images that could not be used."""
    part: tuple[int, int] | None = None
    """(i, n): the i-th of n parts of each split, counted from 1."""
    version: int = field(default=VERSION)

    @property
    def all_files(self) -> tuple[FileEntry, ...]:
        """Every file of the data set but the manifest."""
        of_splits = (file for split in self.splits.values() for file in (split.records, *split.files))
        return self.quarantine, *of_splits

    def save(self, folder: Path) -> None:
        """Writes manifest.json, synced to the disk."""
        write_file(folder / MANIFEST_NAME, _text(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises FileNotFoundError if `folder` has no manifest, ValueError if it is damaged or of a newer version."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no converted data set: it has no {MANIFEST_NAME}.")
        try:
            text = path.read_bytes().decode()
            content = json.loads(text)
            content.pop("checksum", None)
            written = _text(content)
            version = content["version"]
            if isinstance(version, int) and version > VERSION:
                raise ValueError(
                    f"its version is {version}, and this program knows versions up to {VERSION}; update leoclr-fast"
                )
            if text != written:
                raise ValueError("it was changed after it was written: its checksum is wrong")
            manifest = cls(
                **content
                | {
                    "classes": tuple(content["classes"]),
                    "splits": {name: SplitManifest.from_json(entry) for name, entry in content["splits"].items()},
                    "quarantine": FileEntry(**content["quarantine"]),
                    "part": tuple(content["part"]) if content["part"] else None,
                }
            )
            if manifest.format not in FORMATS or not manifest.splits:
                raise ValueError(f"format {manifest.format!r}, {len(manifest.splits)} splits")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
        return manifest


def is_converted(folder: Path) -> bool:
    """Whether a folder is a converted data set, whole or damaged."""
    return (folder / MANIFEST_NAME).is_file()


def _text(content: dict[str, Any]) -> str:
    """JSON with a checksum of the rest as its last entry, so that no damage goes unseen."""
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": checksum}, indent=1) + "\n"
