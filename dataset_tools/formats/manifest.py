"""What a converted data set says about itself: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dataset_tools.formats.records import EXTENSIONS, REENCODED
from dataset_tools.formats.row_file import RowFile

MANIFEST_NAME = "manifest.json"
VERSION = 1
FORMATS = ("ffcv", "webdataset")
FFCV_BATCH_SIZE, FFCV_BATCHES_AHEAD = 256, 3
"""What FFCV's decoding memory is stated for; the latter is its default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the data set."""

    name: str
    bytes: int
    sha256: str
    """Hexadecimal, as `sha256sum` prints it. Of a .beton it is that of its blocks' SHA-256 (32 bytes each, one behind
    the other), so that all cores can compute it.
    """
    block_bytes: int | None = None
    """How long a block is, all but the last; None: `sha256` is that of the file itself."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"{self.name!r} is no name of a file of this folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """One split of a converted data set."""

    samples: int
    positions: int
    """Images of the source that were to be converted: `samples` and those in quarantine."""
    passed_through: int
    reencoded: int
    reasons: dict[str, int]
    """Why images were re-encoded → how many."""
    quarantined: int
    encodings: dict[str, int]
    """How images are stored (jpg, raw, png) → how many."""
    max_width: int
    max_height: int
    max_bytes: int
    total_bytes: int
    """Of the encoded images."""
    page_bytes: int | None
    """FFCV's page size."""
    records: FileEntry
    files: tuple[FileEntry, ...]
    """The images: one .beton, or the tars in order, each followed by its .idx."""

    @classmethod
    def of(cls, rows: RowFile, **given: Any) -> SplitManifest:
        """What the `rows` say, and what is `given` beside."""
        encodings: dict[str, int] = {}
        largest = {"width": 0, "height": 0, "num_bytes": 0}
        total_bytes = reencoded = 0
        for block, _ in rows.blocks():
            largest = {name: max(value, int(block[name].max())) for name, value in largest.items()}
            total_bytes += int(block["num_bytes"].sum())
            reencoded += int((block["handling"] == REENCODED).sum())
            for encoding, extension in EXTENSIONS.items():
                if count := int((block["encoding"] == encoding).sum()):
                    encodings[extension] = encodings.get(extension, 0) + count
        return cls(
            samples=len(rows),
            passed_through=len(rows) - reencoded,
            reencoded=reencoded,
            encodings=dict(sorted(encodings.items())),
            max_width=largest["width"],
            max_height=largest["height"],
            max_bytes=largest["num_bytes"],
            total_bytes=total_bytes,
            **given,
        )

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> SplitManifest:
        """The inverse of `asdict`. Raises ValueError, KeyError or TypeError."""
        files = tuple(_build(FileEntry, file) for file in entry["files"])
        split: SplitManifest = _build(cls, entry | {"files": files, "records": _build(FileEntry, entry["records"])})
        return split

    @property
    def ffcv_decode_bytes(self) -> int:
        """What FFCV's stock decoders allocate: (batches ahead + 2) x batch x largest width x largest height x 3."""
        return (FFCV_BATCHES_AHEAD + 2) * FFCV_BATCH_SIZE * self.max_width * self.max_height * 3

    @property
    def image_files(self) -> tuple[str, ...]:
        """Names of the files that hold images, by shard number."""
        return tuple(file.name for file in self.files if not file.name.endswith(".idx"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A converted data set."""

    format: str
    """ffcv or webdataset."""
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
        with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
            file.write(_text(asdict(self)))
            file.flush()
            os.fsync(file.fileno())

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
            splits = {name: SplitManifest.from_json(entry) for name, entry in content["splits"].items()}
            part = tuple(content["part"]) if content["part"] else None
            quarantine = _build(FileEntry, content["quarantine"])
            built = {"splits": splits, "classes": tuple(content["classes"]), "part": part, "quarantine": quarantine}
            manifest = _build(cls, content | built)
            if manifest.format not in FORMATS or not splits:
                raise ValueError(f"format {manifest.format!r}, {len(splits)} splits")
            if text != written:
                raise ValueError("it was changed after it was written: its checksum is wrong")
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


def _build(kind: type[Any], content: dict[str, Any]) -> Any:
    expected = {each.name for each in fields(kind)}
    if content.keys() != expected:
        odd = sorted(content.keys() ^ expected)
        raise ValueError(f"{kind.__name__} lacks, or should not have: {', '.join(odd)}")
    return kind(**content)
