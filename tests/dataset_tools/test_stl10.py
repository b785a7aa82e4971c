from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.sources import open_source
from tests.dataset_tools.made_up import decode_png

CLASSES = ["ship", "bird", "zebra"]
RANK = [1, 0, 2]
COUNTS = {"train": 4, "test": 3, "unlabeled": 2}


@pytest.fixture
def stl10(tmp_path: Path) -> Path:
    """A small made-up stl10_binary folder; its labels count from 1."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        (folder / f"{split}_X.bin").write_bytes(rng.bytes(count * 3 * 96 * 96))
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(rng.integers(1, 4, count, dtype=np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


@pytest.mark.parametrize("parent", [False, True])
def test_equals_torchvision(stl10: Path, parent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    source = open_source(stl10.parent if parent else stl10)
    assert source.kind == "STL-10"
    assert source.classes == ("bird", "ship", "zebra")
    assert list(source.splits) == ["train", "test", "unlabeled"]
    for name, split in source.splits.items():
        oracle = datasets.STL10(stl10.parent, split=name)
        assert len(oracle) == len(split) == COUNTS[name]
        for index, (image, label) in enumerate(oracle):
            assert np.array_equal(decode_png(split.read(index)), np.asarray(image))
            assert split.labels[index] == (-1 if name == "unlabeled" else RANK[label])
    assert source.splits["unlabeled"].names[1] == "unlabeled/00001.png"
    assert source.splits["test"].names[0].startswith("test/")


def test_without_the_large_unlabeled_file(stl10: Path) -> None:
    (stl10 / "unlabeled_X.bin").unlink()
    assert list(open_source(stl10).splits) == ["train", "test"]


def test_damaged_files(stl10: Path) -> None:
    train = open_source(stl10).splits["train"]
    os.truncate(stl10 / "train_X.bin", 27648 * 3)
    with pytest.raises(OSError, match=r"cannot read sample 'train/.*/00003.png': .* 0 of its 27648 bytes"):
        train.read(3)
    with pytest.raises(ValueError, match="is damaged: 3 train images but 4 labels"):
        open_source(stl10)
    os.truncate(stl10 / "train_X.bin", 27648 * 3 + 1)
    with pytest.raises(ValueError, match=r"train_X.bin has 82945 bytes, which is no multiple of 27648"):
        open_source(stl10)


def test_labels_out_of_range(stl10: Path) -> None:
    (stl10 / "test_y.bin").write_bytes(b"\x01\x02\x04")
    with pytest.raises(ValueError, match="labels from 0 to 3 for 3 classes"):
        open_source(stl10)
    (stl10 / "test_y.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"looks like STL-10 but lacks test_y.bin"):
        open_source(stl10)
