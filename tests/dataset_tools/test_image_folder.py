from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.account import Account
from dataset_tools.schema import convert
from dataset_tools.sources import open_source
from tests.dataset_tools.made_up import read_all


def test_order_and_labels_are_those_of_torchvision(write_tree) -> None:
    image_folder = pytest.importorskip("torchvision.datasets").ImageFolder
    names = "b/2.jpg b/10.JPEG b/1.png b/deep/er/x.webp b/deep-er/x.tiff b/deep/0.bmp a/Z.jpg a/z.PGM a/ä.jpg"
    names += " a/notes.txt a/x.jpg.gz C/only.ppm b2/u.jpeg b-2/u.tif"
    root = write_tree(names)
    (root / "loose.jpg").write_bytes(b"not in a class")
    (root / "C" / "link.jpg").symlink_to(root / "a" / "Z.jpg")
    elsewhere = root.with_name("elsewhere")
    shutil.copytree(root / "b", elsewhere)
    (root / "D").symlink_to(elsewhere, target_is_directory=True)

    source, oracle = open_source(root), image_folder(root)
    train = source.splits["train"]
    assert source.kind == "image folder"
    assert source.classes == train.classes == tuple(oracle.classes) == ("C", "D", "a", "b", "b-2", "b2")
    assert list(zip(map(str, (root / name for name in train.names)), train.labels, strict=True)) == oracle.samples
    assert len(train) == 19
    assert train.labels.dtype == np.int64
    for index, (path, _) in enumerate(oracle.samples):
        assert train.read(index) == Path(path).read_bytes()


@pytest.mark.parametrize(
    ("names", "classes", "expected", "warning"),
    [
        (
            "unlabeled/x.jpg unlabeled/any/y.jpg test/dog/1.jpg valid/cat/1.jpg valid/dog/1.jpg train/dog/2.jpg "
            "train/cat/1.jpg train/ant/",
            ("ant", "cat", "dog"),
            {
                "train": {"train/cat/1.jpg": 1, "train/dog/2.jpg": 2},
                "val": {"valid/cat/1.jpg": 1, "valid/dog/1.jpg": 2},
                "test": {"test/dog/1.jpg": 2},
                "unlabeled": {"unlabeled/x.jpg": -1, "unlabeled/any/y.jpg": -1},
            },
            "",
        ),
        ("2.jpg 10.jpg empty/", (), {"train": {"10.jpg": -1, "2.jpg": -1}}, ""),
        (
            "bus/1.jpg train/1.jpg test/1.jpg",
            ("bus", "test", "train"),
            {"train": {"bus/1.jpg": 0, "test/1.jpg": 1, "train/1.jpg": 2}},
            "",
        ),
        (
            "train/a/1.jpg val/a/1.jpg docs/figure.png",
            ("a",),
            {"train": {"train/a/1.jpg": 0}, "val": {"val/a/1.jpg": 0}},
            "left out, being beside train, val: docs",
        ),
        ("train/a/1.jpg train/loose.jpg", ("a",), {"train": {"train/a/1.jpg": 0}}, "1 images in 'train'"),
        ("train/a/1.jpg loose.jpg", ("a",), {"train": {"train/a/1.jpg": 0}}, "left out, being beside train: 1 images"),
        ("train/a/1.jpg val/", ("a",), {"train": {"train/a/1.jpg": 0}}, "its folder 'val' holds no image"),
        (
            "train/all/a/1.jpg train/all/b/1.jpg",
            ("all",),
            {"train": {"train/all/a/1.jpg": 0, "train/all/b/1.jpg": 0}},
            "one class, all; if its folders a, b are the classes",
        ),
        ("a/1.jpg a/._1.jpg .git/x/1.jpg __MACOSX/a/1.jpg a/.b/1.jpg", ("a",), {"train": {"a/1.jpg": 0}}, ""),
    ],
)
def test_layouts(write_tree, caplog, names: str, classes: tuple[str, ...], expected: Any, warning: str) -> None:
    """Splits come in their order, and share the class list of train."""
    source = open_source(write_tree(names))
    assert source.classes == classes
    assert list(source.splits) == list(expected)
    for name, split in source.splits.items():
        assert list(zip(split.names, split.labels.tolist(), strict=True)) == list(expected[name].items())
        assert read_all(split) == [each.encode() for each in split.names]
        assert split.name == name
    assert warning in caplog.text


def test_a_folder_is_visited_once_however_many_links_lead_to_it(write_tree, caplog) -> None:
    root = write_tree({"a/1.jpg": b"1", "b/1.jpg": b"2", "z/last/1.jpg": b"3"})
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "A").symlink_to(root / "b", target_is_directory=True)
    for level in range(40):  # 2**40 ways through it
        (root / "z" / str(level)).mkdir()
        for name in "xy":
            target = root / "z" / (str(level + 1) if level < 39 else "last")
            (root / "z" / str(level) / name).symlink_to(target, target_is_directory=True)
    source = open_source(root)
    assert list(source.splits["train"].names) == ["a/1.jpg", "b/1.jpg", "z/last/1.jpg"]
    assert f"the link {root}/A leads to a folder that is read already" in caplog.text


@pytest.mark.parametrize(
    ("names", "classes", "expected", "said"),
    [
        ("Train/cat/1.jpg Val/cat/1.jpg", ("cat",), {"train": 1, "val": 1}, ""),
        ("TRAINING/cat/1.jpg testing/cat/1.jpg", ("cat",), {"train": 1, "test": 1}, ""),
        ("set/train/cat/1.jpg set/valid/cat/1.jpg docs/a.txt", ("cat",), {"train": 1, "val": 1}, "docs"),
        ("set/cat/1.jpg set/dog/1.jpg", ("cat", "dog"), {"train": 2}, ""),
        ("cat/1.jpg lost+found/ cat/@eaDir/1.jpg/thumb.jpg .git/x.jpg cat/Thumbs.db", ("cat",), {"train": 1}, "hidden"),
        ("a/1.jfif b/1.GIF c/1.JPE", ("a", "b", "c"), {"train": 3}, ""),
        ("a/1.jpg b/1.heic b/2.heic", ("a", "b"), {"train": 1}, "2 .heic (b/1.heic, b/2.heic)"),
        ("a/1.jpg b/1.heic", ("a", "b"), {"train": 1}, "1 of its 2 classes hold no image: b"),
        ("1.jpg 2.jpg", (), {"train": 2}, "no labels"),
        (
            "train/n01440764/n01440764_1.JPEG val/ILSVRC2012_val_00000293_n01440764.JPEG",
            ("n01440764",),
            {"train": 1, "val": 1},
            "",
        ),
        ("n01440764_1_n01440764.JPEG n01443537_9.JPEG", ("n01440764", "n01443537"), {"train": 2}, ""),
        ("a/1.jpg more.tar", ("a",), {"train": 1}, "1 tars, which are not read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_understood_and_what_is_not_read_is_said(
    write_tree, write_tar, caplog, kind: str, names: str, classes: Any, expected: dict[str, int], said: str
) -> None:
    """A tar of a folder is read as the folder is."""
    if kind == "tar" and ("/ " in names or ".tar" in names):
        pytest.skip("not in a tar")
    caplog.set_level("INFO")
    tar_of_names = {name: name.encode() for name in names.split()}
    source = open_source(write_tree(names) if kind == "folder" else write_tar(tar_of_names))
    assert source.classes == classes
    assert {name: len(split) for name, split in source.splits.items()} == expected
    assert all((split.labels >= 0).all() == bool(classes) for split in source.splits.values())
    assert said in caplog.text
    assert convert(asdict(source.account), Account, "") == source.account


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a/train/x/1.jpg a/val/x/1.jpg b/train/x/1.jpg", "its folder 'a' holds train and val itself"),
        ("Training_set/x/1.jpg Test_set/x/1.jpg", "its folders Test_set, Training_set would be classes"),
        ("train2017/1.jpg val2017/1.jpg", "its folders train2017, val2017 would be classes"),
        ("ffcv/train.beton", "train.beton looks like a .beton of FFCV itself"),
        ("data.mdb lock.mdb", "data.mdb looks like an LMDB"),
        ("train/a.zip", "a.zip looks like an archive"),
        ("a/1.heic", "holds no image.*1 .heic"),
        ("", "holds no image. Expected"),
        ("a/notes.txt train/b/", "holds no image. Expected"),
        ("train/a/1.jpg val/c/1.jpg val/b/1.jpg", "val has 2 class.* that train lacks: b, c"),
        ("train/a/1.jpg val/a/1.jpg valid/a/1.jpg", "'val' and 'valid', which mean the same"),
    ],
)
def test_unusable_folders(write_tree, files: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(write_tree(files))


def test_a_file_that_vanished_is_named(write_tree) -> None:
    root = write_tree({"a/1.jpg": b"1", "a/2.jpg": b"2"})
    (root / "a" / "broken.jpg").symlink_to(root / "nowhere")
    train = open_source(root).splits["train"]
    (root / "a" / "2.jpg").unlink()
    assert train.read(0) == b"1"
    for index, name in ((1, "a/2.jpg"), (2, "a/broken.jpg")):
        with pytest.raises(OSError, match=f"cannot read sample '{name}' of .*No such file or directory"):
            train.read(index)


def test_a_folder_that_cannot_be_read_is_an_error(write_tree) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    root = write_tree({"a/1.jpg": b"1", "b/1.jpg": b"2"})
    (root / "b").chmod(0)
    with pytest.raises(PermissionError, match="b"):
        open_source(root)


def test_subsets_compose_and_pickle(write_tree) -> None:
    train = open_source(write_tree({f"{c}/{i}.jpg": f"{c}{i}".encode() for c in "ab" for i in range(5)})).splits[
        "train"
    ]
    subset = train.subset([9, 0, 4, 6])
    inner = pickle.loads(pickle.dumps(subset.subset(np.array([2, 0]))))
    assert list(subset.names) == ["b/4.jpg", "a/0.jpg", "a/4.jpg", "b/1.jpg"]
    assert subset.labels.tolist() == [1, 0, 0, 1]
    assert [subset.read(i) for i in range(len(subset))] == [b"b4", b"a0", b"a4", b"b1"]
    assert list(inner.names) == ["a/4.jpg", "b/4.jpg"]
    assert [inner.read(0), inner.read(1)] == [b"a4", b"b4"]
    assert (inner.name, inner.classes, len(inner)) == ("train", ("a", "b"), 2)
    assert len(train.subset([])) == 0


def test_sample_digest_tells_bytes_apart(write_tree) -> None:
    files = {f"{split}/a/{i:02}.jpg": bytes([i]) for split in ("train", "test") for i in range(40)}
    root = write_tree(files)
    first = open_source(root).sample_digest()
    assert open_source(root).sample_digest() == first
    assert open_source(root).sample_digest(per_split=40) != first
    (root / "train/a/01.jpg").write_bytes(b"not among the 16")
    assert open_source(root).sample_digest() == first
    (root / "test/a/39.jpg").write_bytes(b"the last one is")
    changed = open_source(root).sample_digest()
    source = open_source(root)
    (root / "test/a/39.jpg").unlink()
    assert len({first, changed, source.sample_digest()}) == 3


def test_fingerprint_tells_names_and_labels_apart(write_tree) -> None:
    root = write_tree({"train/a/1.jpg": b"1", "train/b/1.jpg": b"2"})
    first = open_source(root).fingerprint
    (root / "train/a/1.jpg").write_bytes(b"other bytes")
    assert open_source(root).fingerprint == first
    (root / "train/b/1.jpg").rename(root / "train/b/2.jpg")
    renamed = open_source(root).fingerprint
    (root / "train/b/2.jpg").rename(root / "train/b/1.jpg")
    (root / "train").rename(root / "test")
    assert len({first, renamed, open_source(root).fingerprint}) == 3
