"""What the manifest says of a file and of a split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_tools.formats.records import EXTENSIONS, REENCODED
from dataset_tools.formats.row_file import RowFile


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
        """Sums up the `rows`; `given` are the fields that they do not tell."""
        encodings = Counter[str]()
        largest = {"width": 0, "height": 0, "num_bytes": 0}
        total_bytes = reencoded = 0
        for block, _ in rows.blocks():
            largest = {name: max(value, int(block[name].max())) for name, value in largest.items()}
            total_bytes += int(block["num_bytes"].sum())
            reencoded += int((block["handling"] == REENCODED).sum())
            encodings.update({name: int((block["encoding"] == code).sum()) for code, name in EXTENSIONS.items()})
        return cls(
            samples=len(rows),
            passed_through=len(rows) - reencoded,
            reencoded=reencoded,
            encodings={name: count for name, count in sorted(encodings.items()) if count},
            max_width=largest["width"],
            max_height=largest["height"],
            max_bytes=largest["num_bytes"],
            total_bytes=total_bytes,
            **given,
        )

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> SplitManifest:
        """The inverse of `asdict`. Raises ValueError, KeyError or TypeError."""
        files = tuple(FileEntry(**file) for file in entry["files"])
        return cls(**entry | {"files": files, "records": FileEntry(**entry["records"])})

    @property
    def image_files(self) -> tuple[str, ...]:
        """Names of the files that hold images, by shard number."""
        return tuple(file.name for file in self.files if not file.name.endswith(".idx"))
