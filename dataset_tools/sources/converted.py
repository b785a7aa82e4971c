"""A data set that `convert` made: its images by index, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from dataset_tools.files import ByteFile
from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.manifest import Manifest, require_files
from dataset_tools.formats.output_format import OutputFormat
from dataset_tools.formats.records import HASH_BYTES, RAW, SampleRecords
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.raw_pixels import quick_png
from dataset_tools.sources.split import ImageSource, RottenImageError, Split, split_rank


class ConvertedSplit(Split):
    """Samples of a .beton or of numbered tars. Memory: the name and 16 bytes for each."""

    def __init__(
        self, name: str, records: Path, files: tuple[ByteFile, ...], classes: tuple[str, ...], output: OutputFormat
    ) -> None:
        """`records`: a file. `output`: the format of `files`. Raises FileNotFoundError, or ValueError for damage."""
        self.name, self.files, self.classes, self.output = name, files, classes, output
        self._is_checked = False
        self.file_bytes = [file.path.stat().st_size for file in files]
        self.records = SampleRecords.open(records)
        self.names: PackedNames = self.records.names()
        self.labels = np.array(self.records["label"], dtype=np.int64)

    def check(self) -> None:
        if not self._is_checked:
            self.records.check(self.file_bytes, len(self.classes))
            self._is_checked = True

    def read(self, index: int) -> bytes:
        """Raw pixels come as a PNG."""
        return self._encoded(index, self.read_stored(index))

    def read_checked(self, index: int) -> bytes:
        data = self.read_stored(index)
        if hashlib.sha256(data).digest()[:HASH_BYTES] != self.records["hash"][index].tobytes():
            raise RottenImageError(f"its bytes in {self.records.path.parent} are not those that were written")
        return self._encoded(index, data)

    def _encoded(self, index: int, data: bytes) -> bytes:
        if self.records["encoding"][index] != RAW:
            return data
        size = int(self.records["width"][index]), int(self.records["height"][index])
        return quick_png(Image.frombytes("RGB", size, data))

    def read_stored(self, index: int) -> bytes:
        """The bytes as they lie on disk: JPEG, PNG or uint8 [H, W, 3]."""
        records, index = self.records, range(len(self))[index]
        file = self.files[int(records["shard"][index])]
        return file.read(int(records["offset"][index]), int(records["num_bytes"][index]), sample=self.names[index])

    def __reduce__(self) -> tuple[object, ...]:
        return ConvertedSplit, (self.name, self.records.path, self.files, self.classes, self.output)


def open_split(folder: Path, manifest: Manifest, name: str) -> ConvertedSplit:
    """A split of a converted data set. Raises FileNotFoundError, or ValueError for damage."""
    entry = manifest.splits[name]
    files = tuple(ByteFile(folder / file) for file in entry.image_files)
    split = ConvertedSplit(name, folder / entry.records.name, files, manifest.classes, FORMATS[manifest.format])
    if len(split) != entry.samples:
        raise ValueError(f"{split.records.path} knows {len(split)} samples, the manifest {entry.samples}")
    return split


def open_converted(folder: Path) -> ImageSource:
    """A folder with a manifest.json. Nothing but the manifest and the names is read.

    Raises ValueError if manifest or records are damaged or do not fit, FileNotFoundError if files are missing.
    """
    manifest = Manifest.load(folder)
    splits: dict[str, Split] = {}
    for name in sorted(manifest.splits, key=split_rank):
        require_files(folder, manifest.splits[name].all_files)
        split = open_split(folder, manifest, name)
        if split.labels.min() < -1 or split.labels.max() >= len(manifest.classes):
            raise ValueError(f"{split.records.path} is damaged: it has labels that do not exist")
        splits[name] = split
    title = FORMATS[manifest.format].title
    return ImageSource(path=folder, kind=title, splits=splits, classes=manifest.classes)
