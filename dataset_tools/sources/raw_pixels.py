"""Images that are stored as raw pixels: handed out as PNG files, without loss."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset_tools.files import ByteFile, read_file
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.split import Split

MAX_MAT_BYTES = 1 << 26
_PACKED = 15
"""The kind of an element of a .mat that zlib has packed."""


class PixelSplit(Split):
    """Square RGB images, named by split, class and index: "train/frog/00000.png"."""

    def __init__(self, name: str, labels: NDArray[np.int64], classes: tuple[str, ...]) -> None:
        self.name, self.labels, self.classes = name, labels, classes
        folders = [f"{name}/{label}" for label in classes] + [name]  # the last one for -1, unlabelled
        self.names = PackedNames(f"{folders[label]}/{index:05}.png" for index, label in enumerate(labels))

    @abstractmethod
    def pixels(self, index: int) -> NDArray[np.uint8]:
        """uint8 [3, H, W]."""

    def read(self, index: int) -> bytes:
        return quick_png(Image.fromarray(np.ascontiguousarray(self.pixels(index).transpose(1, 2, 0))))


class RecordSplit(PixelSplit):
    """Images in files of equal records, each one `header` bytes and then the planes red, green, blue.

    Nothing is kept in memory but names and labels. `side` in pixels; `column_major`: planes are stored
    column by column.
    """

    def __init__(
        self,
        name: str,
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
        *,
        files: Sequence[Path],
        header: int,
        side: int,
        column_major: bool = False,
    ) -> None:
        super().__init__(name, labels, classes)
        self.header, self.side, self.column_major = header, side, column_major
        self.record_bytes = header + 3 * side * side
        self.files = tuple(map(ByteFile, files))
        self.first = np.cumsum([0] + [path.stat().st_size // self.record_bytes for path in files])

    def pixels(self, index: int) -> NDArray[np.uint8]:
        index = range(len(self))[index]
        file = int(np.searchsorted(self.first, index, side="right")) - 1
        offset = (index - int(self.first[file])) * self.record_bytes + self.header
        data = self.files[file].read(offset, self.record_bytes - self.header, sample=self.names[index])
        planes = np.frombuffer(data, dtype=np.uint8).reshape(3, self.side, self.side)
        return planes.transpose(0, 2, 1) if self.column_major else planes


def quick_png(image: Image.Image) -> bytes:
    """A PNG of the image, little compressed."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def read_records(path: Path, record_bytes: int) -> NDArray[np.uint8]:
    """The records of a file, uint8 [N, record_bytes], memory-mapped.

    Raises ValueError if its size is no multiple of `record_bytes`.
    """
    size = path.stat().st_size
    if size == 0 or size % record_bytes:
        raise ValueError(
            f"{path} has {size} bytes, which is no multiple of {record_bytes}: it is cut short or something "
            "else; download it again."
        )
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, record_bytes)


def remap(
    labels: NDArray[np.int64], stored_classes: Sequence[str], path: Path
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels that count in `stored_classes` → labels that count in these sorted by name, and those.

    Raises ValueError, naming `path`, for a label that is out of range, or classes that are not distinct or no text.
    """
    classes = tuple(sorted(stored_classes))
    try:
        "".join(classes).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} is damaged: a class name is no text: {error.reason}") from error
    if len(set(stored_classes)) != len(stored_classes) or not stored_classes:
        raise ValueError(f"{path} is damaged: its class names are missing or not distinct: {stored_classes}")
    if labels.min() < 0 or labels.max() >= len(stored_classes):
        raise ValueError(f"{path} is damaged: labels from {labels.min()} to {labels.max()} for {len(classes)} classes")
    rank = np.empty(len(classes), dtype=np.int64)
    rank[sorted(range(len(classes)), key=stored_classes.__getitem__)] = np.arange(len(classes))
    return rank[labels], classes


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def read_table(path: Path, wanted: tuple[str, ...], delimiter: str) -> list[dict[str, str]]:
    """The rows of a table, by the names in its first line. Raises ValueError unless all have the `wanted` columns."""
    text = io.StringIO(_text(path), newline="")
    if delimiter == ",":
        reader = csv.DictReader(text)
    else:
        reader = csv.DictReader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        rows = list(reader)
        names = list(reader.fieldnames or ())
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: line {reader.line_num}: {error}") from error
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path} is damaged: its first line has no column {name!r}, but {', '.join(names)[:200]}")
        if any(row[name] is None for row in rows):
            raise ValueError(f"{path} is damaged: a line is cut off before its column {name!r}")
    return rows


def check_mat(content: bytes, where: str) -> None:
    """Raises ValueError for a .mat in which more than MAX_MAT_BYTES are packed: zlib makes a thousandth of them."""
    position, left = 128, MAX_MAT_BYTES
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, position)
        position += 8
        if kind == _PACKED:
            left -= len(zlib.decompressobj().decompress(content[position : position + size], left + 1))
            if left < 0:
                raise ValueError(f"{where} is damaged: more than {MAX_MAT_BYTES >> 20} MiB are packed in it")
        position += size


def _text(path: Path) -> str:
    return read_file(path).decode("utf-8-sig", "surrogateescape")


def require_files(folder: Path, names: Sequence[str], kind: str) -> None:
    """Raises FileNotFoundError, listing what is missing."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} looks like {kind} but lacks {', '.join(missing)}; download it again.")
