"""The two files that describe a converted data set: records.safetensors and manifest.json."""

from __future__ import annotations

import hashlib
import json
import os
import random
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.conversion.convert import convert, summarize
from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.beton import ALLOCATION, METADATA, METADATA_START, read_beton_head
from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.manifest import Manifest, is_converted
from dataset_tools.formats.records import BLOCK_ROWS, RAW, ROW, SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import FileEntry, SplitManifest
from dataset_tools.packed_names import PackedNames
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals
from tests.dataset_tools.conversion.pictures import encoded, flat
from tests.dataset_tools.conversion.trouble import tampered
from tests.dataset_tools.made_up import write_files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"train/{label}/{number}.jpg" for label in "abc" for number in range(20)]
    names += ["val/b/ünï\ncode.jpg", os.fsdecode(b"val/c/\xff.jpg")]
    files = {name: encoded(flat((index, 0, 99), 20 + index % 5)) for index, name in enumerate(names)}
    return write_files(tmp_path_factory.mktemp("records"), files)


@pytest.fixture(scope="module", params=["ffcv", "webdataset"])
def made(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / request.param
    convert(source, target, ConvertOptions(format=request.param, shard_size="64KiB"), workers=1)
    return target


def some_rows(count: int) -> np.ndarray:
    rows = np.zeros(count, dtype=ROW)
    random = np.random.default_rng(count)
    for name in ROW.names:
        base, shape = ROW[name].base, ROW[name].shape
        rows[name] = random.integers(0, np.iinfo(base).max, (count, *shape), dtype=base)
    return rows


def write(folder: Path, rows: np.ndarray, names: PackedNames) -> Path:
    """The record file of `rows`."""
    row_file = RowFile(folder / "rows")
    row_file.append(rows)
    row_file.write_records(folder / "records.safetensors", names, of_source=False)
    row_file.close()
    return folder / "records.safetensors"


class TestRecords:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_the_safetensors_library_reads_them(self, made: Path, split: str) -> None:
        load_file = pytest.importorskip("safetensors.numpy").load_file
        path = made / f"{split}.records.safetensors"
        theirs, ours = load_file(path), SampleRecords.open(path)
        assert theirs.keys() == ours.columns.keys() == {*ROW.names, "name_ends", "name_bytes"}
        for name, column in theirs.items():
            assert column.dtype == ours[name].dtype
            np.testing.assert_array_equal(column, ours[name])
        assert theirs["hash"].shape == (len(ours), 16)
        assert PackedNames.from_buffers(theirs["name_bytes"].tobytes(), theirs["name_ends"]) == ours.names()

    @pytest.mark.parametrize("count", [1, 2, 7, 1000, BLOCK_ROWS + 3])
    def test_round_trip(self, tmp_path: Path, count: int) -> None:
        rows = some_rows(count)
        names = PackedNames(f"{number}/ä{'x' * (number % 5)}" for number in range(count))
        path = write(tmp_path, rows, names)
        records = SampleRecords.open(path)
        assert len(records) == count
        np.testing.assert_array_equal(records.rows(), rows)
        np.testing.assert_array_equal(records.rows(1, 5), rows[1:5])
        assert records.names() == names
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0, "so that all columns are aligned"


@given(data=st.data())
def test_a_row_that_cannot_be_is_named(data: st.DataObject) -> None:
    """Whatever else stands in it would be read, allocated or shown as another image."""
    good = np.zeros(3, dtype=ROW)
    good["offset"], good["num_bytes"], good["width"], good["height"], good["shard"] = (0, 10, 4090), 6, 1, 2, (0, 0, 1)
    good["encoding"], good["label"] = RAW, (-1, 0, 4)
    records = SampleRecords(Path("made"), {name: good[name].copy() for name in ROW.names})
    records.check([4000, 4096], num_classes=5)
    column = data.draw(st.sampled_from([name for name in ROW.names if name != "hash"]))
    index, limits = data.draw(st.integers(0, 2)), np.iinfo(ROW[column])
    value = data.draw(st.integers(int(limits.min), int(limits.max)) | st.integers(-2 if limits.min else 0, 5))
    records.columns[column][index] = value
    sizes, row = (4000, 4096), records.rows()[index]
    possible = {
        "offset": 0 <= value <= sizes[row["shard"] % 2] - 6,
        "num_bytes": value == 6,
        "width": value == 1,
        "height": value == 2,
        "label": -1 <= value < 5,
        "shard": value == good["shard"][index] or (value == 1 and index < 2),
        "encoding": value <= 2,
        "handling": value <= 1,
        "position": value >= 0,
        "source_index": value >= 0,
    }
    if possible[column]:
        records.check(sizes, num_classes=5)
    else:
        with pytest.raises(ValueError, match=f"made is damaged: sample {index} has the "):
            records.check(sizes, num_classes=5)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beton")
    source = write_files(folder / "source", {f"a/{n}.jpg": encoded(flat((n, 0, 99), 20 + n)) for n in range(5)})
    convert(source, folder / "made", ConvertOptions(format="ffcv"), workers=1)
    return folder / "made"


HEAD_BYTES, TABLE_BYTES = METADATA_START + 5 * METADATA.itemsize, 5 * ALLOCATION.itemsize


@given(st.dictionaries(st.integers(-TABLE_BYTES, HEAD_BYTES - 1), st.integers(0, 255), min_size=1, max_size=3))
def test_any_change_in_a_betons_header_and_tables_is_found(beton: Path, changes: dict[int, int]) -> None:
    """`changes`: places, counted from the file's end where they are negative, and what is put there."""
    path = beton / "train.beton"
    manifest, records = Manifest.load(beton).splits["train"], SampleRecords.open(beton / "train.records.safetensors")
    table_at = path.stat().st_size - TABLE_BYTES
    with open(path, "r+b", buffering=0) as file:
        before = os.pread(file.fileno(), HEAD_BYTES, 0), os.pread(file.fileno(), TABLE_BYTES, table_at)
        head, table = map(bytearray, before)
        for at, value in changes.items():
            (table if at < 0 else head)[at] = value
        try:
            os.pwrite(file.fileno(), head, 0)
            os.pwrite(file.fileno(), table, table_at)
            found = list(FORMATS["ffcv"].problems(beton, manifest, records))
            with suppress(ValueError):
                assert int(read_beton_head(path)["version"]) == 2
        finally:
            os.pwrite(file.fileno(), before[0], 0)
            os.pwrite(file.fileno(), before[1], table_at)
    same = head[:METADATA_START] == before[0][:METADATA_START]
    for dtype, begin, now, then in ((METADATA, METADATA_START, head, before[0]), (ALLOCATION, 0, table, before[1])):
        # bytes between two fields mean nothing
        same &= bool((np.frombuffer(now, dtype, 5, begin) == np.frombuffer(then, dtype, 5, begin)).all())
    assert bool(found) != same


def entry(name: str = "train.beton") -> FileEntry:
    return FileEntry(name=name, bytes=500, sha256="0" * 64)


def manifest(**changes: Any) -> Manifest:
    split = SplitManifest(
        samples=3,
        positions=4,
        passed_through=2,
        reencoded=1,
        reasons={"CMYK": 1},
        quarantined=1,
        encodings={"jpg": 3},
        max_width=500,
        max_height=400,
        max_bytes=999,
        total_bytes=2000,
        page_bytes=2 << 20,
        records=entry("train.records.safetensors"),
        files=(entry(),),
    )
    return replace(
        Manifest(
            format="ffcv",
            classes=("a", "ünï\ncode", os.fsdecode(b"\xff")),
            splits={"train": split},
            source={"kind": "image folder", "fingerprint": "f" * 64},
            options={"format": "ffcv", "max_side": None},
            versions={"pillow": "12.0"},
            quarantine=entry("quarantine.jsonl"),
        ),
        **changes,
    )


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """With the right checksum, as an attacker would."""
    content.pop("checksum", None)
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": checksum}, indent=1) + "\n")


def test_hashing_ends_when_a_signal_asks_for_it(made: Path) -> None:
    stop = StopSignals(requested=True, name="SIGTERM")
    with pytest.raises(StoppedBySignalError, match="stopped by SIGTERM; give the same command again"):
        hash_files([(path, None) for path in made.iterdir()], 2, stop)


class TestManifest:
    @pytest.mark.parametrize("part", [None, (2, 3)])
    def test_round_trip(self, tmp_path: Path, part: tuple[int, int] | None) -> None:
        saved = manifest(part=part)
        saved.save(tmp_path)
        loaded = Manifest.load(tmp_path)
        assert loaded == saved
        assert is_converted(tmp_path)
        before = (tmp_path / "manifest.json").read_bytes()
        loaded.save(tmp_path)
        assert (tmp_path / "manifest.json").read_bytes() == before
        assert before.isascii()

    def test_lists_every_file_with_its_sha256(self, made: Path) -> None:
        listed = {"manifest.json", "quarantine.jsonl"}
        for split in Manifest.load(made).splits.values():
            for file in (split.records, *split.files):
                data = (made / file.name).read_bytes()
                assert file.bytes == len(data)
                listed.add(file.name)
                if file.block_bytes is None:
                    assert file.sha256 == hashlib.sha256(data).hexdigest()
                else:
                    blocks = [data[at : at + file.block_bytes] for at in range(0, len(data), file.block_bytes)]
                    digests = b"".join(hashlib.sha256(block).digest() for block in blocks)
                    assert file.sha256 == hashlib.sha256(digests).hexdigest()
        assert listed == {path.name for path in made.iterdir()}

    @pytest.mark.parametrize("more", [{}, {"something": "new"}])
    def test_a_newer_version_is_refused_before_its_new_keys(self, tmp_path: Path, more: dict[str, str]) -> None:
        manifest(version=2).save(tmp_path)
        write_content(tmp_path, content_of(tmp_path) | more)
        message = r"manifest.json cannot be used: its version is 2, and this program knows versions up to 1; update leo"
        with pytest.raises(ValueError, match=message):
            Manifest.load(tmp_path)

    @pytest.mark.parametrize(
        "name", ["../victim/train", "/elsewhere/train", "", ".", "..", "a\x1b[31m", "a\n", "ä" * 101]
    )
    def test_the_name_of_a_split_becomes_no_path(self, tmp_path: Path, name: str) -> None:
        manifest().save(tmp_path)
        content = content_of(tmp_path)
        content["splits"] = {name: content["splits"]["train"]}
        write_content(tmp_path, content)
        with pytest.raises(ValueError, match=r"a split is called .*its name must be printable, without /"):
            Manifest.load(tmp_path)

    @given(chance=st.randoms(use_true_random=True))
    def test_whatever_stands_in_a_field_is_refused_or_harmless(self, chance: random.Random) -> None:
        content = json.loads(json.dumps(asdict(manifest())))
        values = [-1, 0, 1, 2**31, 2**63, 10**400, 1.5, True, None, "x", "../x", [], {}, [1], ["a"], {"a": {}}]
        tampered(content, values, chance)
        with TemporaryDirectory() as folder:
            write_content(Path(folder), content)
            try:
                loaded = Manifest.load(Path(folder))
            except ValueError as error:
                assert "manifest.json cannot be used" in str(error)  # noqa: PT017
            else:
                assert [file.name for file in loaded.all_files] == [
                    "quarantine.jsonl",
                    "train.records.safetensors",
                    "train.beton",
                ]
                summarize(Path(folder), loaded, images=0, seconds=0.0)

    def test_an_unknown_format_and_no_splits_are_refused(self) -> None:
        with pytest.raises(ValueError, match="format 'tfrecord', 1 splits"):
            manifest(format="tfrecord")
        with pytest.raises(ValueError, match="format 'ffcv', 0 splits"):
            manifest(splits={})
