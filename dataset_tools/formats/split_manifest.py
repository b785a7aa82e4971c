"""What the manifest says of a file and of a split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from dataset_tools.formats.records import EXTENSIONS, REENCODED
from dataset_tools.formats.row_file import RowFile

Count = Annotated[int, Meta(ge=0, le=1 << 60)]
Side = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]


def check_split_name(name: str) -> None:
    """Raises ValueError for the name of a split that could not be the beginning of the names of its files."""
    if not name.isprintable() or "/" in name or name in ("", ".", "..") or len(name.encode()) > 200:
        raise ValueError(f"a split is called {name[:200]!r}: its name must be printable, without /, and a file's name")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the data set."""

    name: str
    bytes: Count
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Hexadecimal, as `sha256sum` prints it. Of a .beton it is that of its blocks' SHA-256 (32 bytes each, one behind
    the other), so that all cores can compute it.
    """
    block_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] | None = None
    """How long a block is, all but the last; None: `sha256` is that of the file itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """One split of a converted data set."""

    samples: Annotated[int, Meta(ge=1, le=1 << 60)]
    positions: Count
    """Images of the source that were to be converted: `samples` and those in quarantine."""
    passed_through: Count
    reencoded: Count
    reasons: dict[str, Count]
    """Why images were re-encoded → how many."""
    quarantined: Count
    encodings: dict[str, Count]
    """How images are stored (jpg, raw, png) → how many."""
    max_width: Side
    max_height: Side
    max_bytes: Count
    total_bytes: Count
    """Of the encoded images."""
    page_bytes: Annotated[int, Meta(ge=1 << 12, le=1 << 31)] | None
    """FFCV's page size."""
    records: FileEntry
    files: tuple[FileEntry, ...]
    """The images: one .beton, or the tars in order, each followed by its .idx."""

    def __post_init__(self) -> None:
        if self.samples != self.passed_through + self.reencoded or self.positions != self.samples + self.quarantined:
            raise ValueError("its counts contradict each other")

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

    @property
    def all_files(self) -> tuple[FileEntry, ...]:
        return self.records, *self.files

    @property
    def image_bytes(self) -> list[int]:
        """The sizes of the files that hold images, by shard number."""
        return [file.bytes for file in self.files if file.name in self.image_files]

    @property
    def image_files(self) -> tuple[str, ...]:
        """Names of the files that hold images, by shard number."""
        return tuple(file.name for file in self.files if not file.name.endswith(".idx"))
