from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.sources import open_source, spool
from tests.dataset_tools.made_up import everything

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NO_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\1\0\0\0"), pa.py_buffer(b"\xff")])
CLASS_NAMES = ["dog", "ant", "cat"]
"""As stored: not sorted."""


def picture(color: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 255 - color)).save(buffer, format)
    return buffer.getvalue()


def hugging_face(features: Mapping[str, Any]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def structs(images: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> Any:
    paths = [None] * len(images) if paths is None else paths
    return pa.array([{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)], type=STRUCT)


def write(path: Path, columns: Mapping[str, Any], class_names: Sequence[str] | None = None, **options: Any) -> Path:
    table = pa.table(dict(columns))
    if class_names is not None:
        label = {"names": list(class_names), "_type": "ClassLabel"}
        table = table.replace_schema_metadata(hugging_face({"image": {"_type": "Image"}, "label": label}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_hub(folder: Path) -> dict[str, list[bytes]]:
    """Two shards of train, one of validation and of test, as `push_to_hub` names them."""
    images = {"train": [picture(i) for i in range(7)], "val": [picture(i) for i in (50, 60)], "test": [picture(90)]}
    train, labels, paths = images["train"], [2, 0, 1, 1, 0, 2, 0], [f"p{i}.JPEG" for i in range(7, 0, -1)]
    for shard, part in enumerate((slice(0, 4), slice(4, 7))):
        columns = {"image": structs(train[part], paths[part]), "label": labels[part]}
        write(folder / f"train-{shard:05}-of-00002.parquet", columns, CLASS_NAMES, row_group_size=2)
    write(
        folder / "validation-00000-of-00001.parquet",
        {"image": structs(images["val"]), "label": [1, 0]},
        CLASS_NAMES,
    )
    test = {"image": structs(images["test"], ["p1.JPEG"]), "label": [-1]}
    write(folder / "test-00000-of-00001.parquet", test, CLASS_NAMES)
    return images


@pytest.mark.parametrize("inside", ["", "data", "plain_text"])
def test_a_data_set_of_the_hub(tmp_path: Path, inside: str) -> None:
    images = write_hub(tmp_path / "repo" / inside)
    (tmp_path / "repo" / "README.md").write_text("read me")
    source = open_source(tmp_path / "repo")
    assert (source.kind, source.path) == ("Parquet", tmp_path / "repo")
    assert source.classes == ("ant", "cat", "dog")
    assert everything(source) == {
        "train": [
            (f"train/p{7 - i}.JPEG", label, data)
            for i, (label, data) in enumerate(zip([1, 2, 0, 0, 2, 1, 2], images["train"], strict=True))
        ],
        "val": [("val/000000000.jpg", 0, images["val"][0]), ("val/000000001.jpg", 2, images["val"][1])],
        "test": [("test/p1.JPEG", -1, images["test"][0])],
    }
    assert all(split.labels.dtype == np.int64 for split in source.splits.values())
    assert all(split.classes == source.classes for split in source.splits.values())


@pytest.mark.parametrize(
    "names",
    [
        {"train": "train.parquet", "val": "valid.parquet", "test": "test.parquet"},
        {"train": "data/tiny-train-0.parquet", "val": "data/tiny-val-0.parquet", "test": "data/tiny-test-0.parquet"},
        {"train": "train/0.parquet", "val": "validation/x.parquet", "test": "test/0.parquet"},
        {"train": "default/train/0000.parquet", "val": "default/validation/0000.parquet"},
        {"val": "val/x.parquet", "test": "test.parquet"},
        {"train": "a.parquet"},
    ],
)
def test_split_names(tmp_path: Path, names: dict[str, str]) -> None:
    for number, name in enumerate(names.values()):
        write(tmp_path / name, {"img": [picture(number)]})
    source = open_source(tmp_path)
    assert everything(source) == {
        split: [(f"{split}/000000000.jpg", -1, picture(number))] for number, split in enumerate(names)
    }
    assert source.classes == ()


def test_files_of_no_split_are_left_out_with_a_warning(tmp_path: Path, caplog) -> None:
    for name in ("train-0.parquet", "extra-0.parquet"):
        write(tmp_path / name, {"img": [picture(1)]})
    assert list(everything(open_source(tmp_path))) == ["train"]
    assert "left out, being of no split: extra-0.parquet" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/train.parquet", "b/train.parquet"), r"several Parquet data sets; give one of the folders: .*/a, .*/b\."),
        (("val.parquet", "valid.parquet"), r"val, valid mean the same split, val: keep one"),
        (
            ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
            r"lacks 1 of 3 files: train-00001-of-00003.parquet; download them",
        ),
    ],
)
def test_ambiguous_and_incomplete_folders(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        write(tmp_path / name, {"img": [picture(1)]})
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_an_image_folder_with_a_table_beside_is_an_image_folder(tmp_path: Path) -> None:
    for folder in ("b", "a/in"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(b"1")
    write(tmp_path / "metadata.parquet", {"img": [picture(1)]})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a" / "loop")
    assert open_source(tmp_path).kind == "image folder"


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"image": structs([picture(1)]), "label": pa.array([3], pa.uint8())}, "3"),
        ({"img": [picture(1)], "fine_label": [40], "coarse_label": [2]}, "40"),
        ({"thing": pa.array([picture(1)], pa.large_binary()), "labels": ["cat"]}, "cat"),
        ({"x": [1.5], "img": [picture(1)], "thumbnail": [b"1"], "label": ["b"]}, "b"),
        ({"img": [picture(1)], "label": pa.array(["cat"]).dictionary_encode()}, "cat"),
        ({"img": [picture(1)], "target": [2.0]}, "2"),
        ({"img": [picture(1)], "Category": [True]}, "1"),
        ({"image": pa.array([{"bytes": picture(1)}]), "text": ["a caption"]}, None),
    ],
)
def test_columns(tmp_path: Path, columns: dict[str, Any], label: str | None) -> None:
    source = open_source(write(tmp_path / "x.parquet", columns))
    assert source.classes == (() if label is None else (label,))
    assert bool(source.account.notes) == (label is None)
    assert everything(source) == {"train": [("train/000000000.jpg", -1 if label is None else 0, picture(1))]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [1], "text": ["a"]},
            r"x.parquet has no image column; .* Its columns: label \(int64\), text \(string\)",
        ),
        ({"a": [b"1"], "b": [b"2"]}, r"x.parquet has several image columns, a, b; expected one of bytes"),
        ({"image": [b"1"], "img": [b"2"]}, r"several image columns, image, img; .*Rename or drop columns"),
        ({"image": [[b"1"]]}, r"no image column"),
        (
            {"image": [b"1"], "label": [1], "fine_label": [2]},
            r"several label columns, label, fine_label; rename or drop",
        ),
        (
            {"image": [b"1"], "label": [1.5]},
            r"row 0 has the label 1.5, which is no whole number",
        ),
        ({"image": [b"1"], "label": [float("inf")]}, r"row 0 has the label inf, which is no whole number"),
        ({"image": [b"1"], "label": NO_UTF8}, r"x.parquet is damaged or cut short \('utf-8' codec"),
        ({"image": [b"1"] * 9999, "label": [0] * 9999}, r"says that it has 9,999 images, which is more than its bytes"),
        ({"image": [b"1"], "label": [[1, 2]]}, r"its column 'label' holds list<.*expected a whole number"),
        ({"image": [b"1"], "label": [-2]}, r"its least label is -2; -1 is for images without one"),
        ({"image": [b"1", None]}, r"x.parquet: row 1 has no image bytes\. Store the images in the file"),
        ({"image": structs([b"1", None], ["a.jpg", "b.jpg"])}, r"row 1 has no image bytes"),
        ({"image": pa.array([], STRUCT)}, r"x.parquet holds Parquet files without rows, so no image"),
    ],
)
def test_unusable_columns(tmp_path: Path, cache_folder: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(write(tmp_path / "x.parquet", columns))
    assert not list(cache_folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("train", "val", "classes", "expected"),
    [
        ([10, 2, None, 2, 0], [10, -1], ("0", "10", "2"), [[1, 2, -1, 2, 0], [1, -1]]),
        (["b", "a", None, "ä"], ["a"], ("a", "b", "ä"), [[1, 0, -1, 2], [0]]),
    ],
    ids=["numbers without names", "text"],
)
def test_labels(tmp_path: Path, train: list[Any], val: list[Any], classes: tuple[str, ...], expected: Any) -> None:
    for split, labels in (("train", train), ("val", val)):
        columns = {"img": [picture(i) for i in range(len(labels))], "label": labels}
        write(tmp_path / f"{split}.parquet", columns)
    source = open_source(tmp_path)
    assert source.classes == classes
    assert [split.labels.tolist() for split in source.splits.values()] == expected


def test_classes_that_train_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"img": [picture(1)], "label": ["b"]})
    write(tmp_path / "val.parquet", {"img": [picture(1)] * 3, "label": ["c", "b", "a"]})
    with pytest.raises(ValueError, match=r"val has 2 class\(es\) that train lacks: a, c\."):
        open_source(tmp_path)


def test_labels_out_of_range_and_names_that_differ(tmp_path: Path) -> None:
    for strange in (3, 1 << 63, "0"):
        columns = {"image": [picture(1)], "label": pa.array([strange], pa.uint64() if strange != "0" else None)}
        with pytest.raises(ValueError, match=rf"it has the label {strange!r}, and gives names to 3 others"):
            open_source(write(tmp_path / "x.parquet", columns, CLASS_NAMES))
    named = open_source(write(tmp_path / "x.parquet", columns | {"label": ["dog"]}, CLASS_NAMES))
    assert named.splits["train"].labels.tolist() == [CLASS_NAMES.index("dog") + 2]
    columns = {"image": [picture(1)], "label": [3]}
    twice = open_source(write(tmp_path / "x.parquet", columns, ["crane", "a", "b", "crane"]))
    assert twice.classes == ("a", "b", "crane (0)", "crane (3)")
    assert twice.splits["train"].labels.tolist() == [3]
    write(tmp_path / "two" / "train-0.parquet", columns, [*CLASS_NAMES, "x"])
    write(tmp_path / "two" / "train-1.parquet", columns, [*CLASS_NAMES, "y"])
    with pytest.raises(ValueError, match=r"differ in their class names, or in the type of their labels"):
        open_source(tmp_path / "two")
    for metadata in ({b"huggingface": b"{"}, hugging_face({"label": {"names": {"0": "a"}}})):
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"Hugging Face metadata cannot be read"):
            open_source(tmp_path / "x.parquet")


def test_an_image_stored_once_for_many_rows_does_not_fill_the_disk(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "RATIO_FROM_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"x.parquet cannot be used: it becomes more than 200 times as large"):
        open_source(write(tmp_path / "x.parquet", {"image": [os.urandom(1 << 13)] * 1000}))
    assert [each.suffix for each in cache_folder.iterdir()] == [".lock"]


def test_a_label_column_that_nobody_knows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "x.parquet", {"image": [picture(1)], "species": [3]})
    for _ in range(2):  # unpacked, and found again
        caplog.clear()
        assert open_source(tmp_path / "x.parquet").classes == ()
        assert "images have no labels; its columns are image, species" in caplog.text


@pytest.mark.parametrize(
    "paths",
    [
        ["a.jpg", "b.jpg", "a.jpg"],
        ["a.jpg", None, "b.jpg"],
        ["a.jpg", "", "b.jpg"],
        ["a.jpg", "/b.jpg", "c.jpg"],
        ["a.jpg", "../b.jpg", "c.jpg"],
        ["a.jpg", "b", "c.jpg"],
    ],
)
def test_paths_that_cannot_be_names(tmp_path: Path, paths: list[str | None]) -> None:
    images = [picture(1), picture(2, "PNG"), picture(3, "WEBP")]
    source = open_source(write(tmp_path / "x.parquet", {"image": structs(images, paths)}))
    assert list(source.splits["train"].names) == ["train/000000000.jpg", "train/000000001.png", "train/000000002.webp"]


def test_unpacked_once_and_found_again_without_pyarrow(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level("INFO")
    write_hub(tmp_path / "data")
    expected = everything(open_source(tmp_path / "data"))
    assert f"unpacking {tmp_path / 'data'} once, into {cache_folder}" in caplog.text
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".crc32", ".images", ".lock", ".npz"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert everything(open_source(tmp_path / "data")) == expected
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    os.utime(file, ns=(1, 1))
    with pytest.raises(RuntimeError, match=r"reading .*\.parquet needs pyarrow: pip install 'leoclr-fast\[parquet\]'"):
        open_source(tmp_path / "data")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:3000] + bytes(200) + data[3200:],
        lambda data: b"PAR1",
        lambda data: b"<html>not found</html>",
        lambda data: b"",
    ],
    ids=["cut", "zeros", "magic only", "html", "empty"],
)
def test_damaged_files(tmp_path: Path, cache_folder: Path, damage: Callable[[bytes], bytes]) -> None:
    columns = {"image": [os.urandom(500) for _ in range(20)], "label": [1] * 20}
    path = write(tmp_path / "x.parquet", columns, write_page_checksum=True, use_dictionary=False, data_page_size=1000)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is damaged or cut short"):
        open_source(path)
    assert [file.suffix for file in cache_folder.iterdir()] == [".lock"]


def test_memory_does_not_grow_with_the_bytes(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from dataset_tools.sources import open_source\n"
        "open_source(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "open_source(sys.argv[2]); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    noise = [os.urandom(100_000) for _ in range(20)]
    paths = [tmp_path / "small.parquet", tmp_path / "large.parquet"]
    for path, repeats in zip(paths, (20, 100), strict=True):
        with pq.ParquetWriter(path, pa.schema([("image", pa.binary())]), use_dictionary=False) as writer:
            for _ in range(repeats):
                writer.write_table(pa.table({"image": noise}))
    run = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 30  # MiB, for 160 MB more
