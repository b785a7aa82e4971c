"""An output format is a class and one row of the table: here is one, which convert, verify and merge take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.merge import merge
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.verify import verify
from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.output_format import OutputFormat, ReadBytes, SampleWriter
from dataset_tools.formats.records import PNG, SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest
from dataset_tools.sources import open_source
from tests.dataset_tools.conversion.trouble import mixed_files
from tests.dataset_tools.made_up import folder_bytes, write_tar


class RowOfImagesWriter(SampleWriter):
    def __init__(self, path: Path, rows: RowFile) -> None:
        self.file = open(path, "r+b" if rows else "w+b")  # noqa: SIM115
        self.file.seek(sum(int(block["num_bytes"].sum()) for block, _ in rows.blocks()))
        self.file.truncate()

    def write(self, rows: np.ndarray, read: ReadBytes) -> None:
        for row in rows:
            data = read(int(row["offset"]), int(row["num_bytes"]))
            row["offset"], row["shard"] = self.file.tell(), 0
            self.file.write(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, rows: RowFile) -> list[Path]:
        self.sync()
        return [Path(self.file.name)]

    def close(self) -> None:
        self.file.close()


class RowOfImages(OutputFormat):
    """The images of a split, one behind the other."""

    title, extension, lossless, default_order, sample_overhead_bytes = "row of images", ".row", PNG, "source", 100

    def writer(self, folder: Path, split: str, *, rows: RowFile, **_: Any) -> RowOfImagesWriter:
        return RowOfImagesWriter(folder / f"{split}.row", rows)

    def problems(self, folder: Path, manifest: SplitManifest, records: SampleRecords) -> Iterator[str]:
        if (folder / manifest.image_files[0]).stat().st_size != manifest.total_bytes:
            yield f"{manifest.image_files[0]}: it is not as long as its images"


def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "row", RowOfImages())
    source = write_tar(tmp_path / "images.tar", mixed_files(60, 30))
    summary = convert(source, tmp_path / "whole", ConvertOptions(format="row"), workers=2)
    assert (summary["format"], summary["samples"], summary["quarantined"]) == ("row", 84, 6)
    assert verify(tmp_path / "whole", source=source, deep=True, workers=1)["problems"] == []
    opened, original = open_source(tmp_path / "whole"), open_source(source)
    assert (opened.kind, opened.classes) == ("row of images", original.classes)
    assert opened.splits["train"].read(3) == original.splits["train"].read(3)

    for number in (1, 2):
        convert(source, tmp_path / str(number), ConvertOptions(format="row", part=f"{number}/2"), workers=1)
    merge([tmp_path / "2", tmp_path / "1"], tmp_path / "joined")
    assert folder_bytes(tmp_path / "joined") == folder_bytes(tmp_path / "whole")
    with open(tmp_path / "joined" / "val.row", "ab") as file:
        file.write(b"more")
    assert "val.row: it is not as long as its images" in verify(tmp_path / "joined", workers=1)["problems"]
