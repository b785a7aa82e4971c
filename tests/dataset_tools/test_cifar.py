from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.sources import open_source
from tests.dataset_tools.made_up import assert_reads_in_processes, decode_png

CLASSES_10 = [f"class {letter}" for letter in "jabcdefghi"]  # not sorted: the first becomes the last
CLASSES_100 = [f"c{number:02}" for number in range(99, -1, -1)]
RANK_10 = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def made_up(count: int, num_classes: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [N, 3072] and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, num_classes, count).tolist()


TRAIN_10 = {f"data_batch_{number}": made_up(number + 2, 10, seed=number) for number in range(1, 6)}
TEST_10 = made_up(5, 10, seed=6)
TRAIN_100, TEST_100 = made_up(7, 100, seed=7), made_up(4, 100, seed=8)


def write_binary_10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in {**TRAIN_10, "test_batch": TEST_10}.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES_10) + "\n\n")
    return folder


def write_pickles_10(folder: Path, protocol: int = 2) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in {**TRAIN_10, "test_batch": TEST_10}.items():
        content = {"batch_label": name, "labels": labels, "data": pixels, "filenames": ["x.png"] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    meta = {"num_cases_per_batch": 1, "label_names": CLASSES_10, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return folder


def check_10(path: Path) -> None:
    source = open_source(path)
    assert source.kind == "CIFAR-10"
    assert source.classes == tuple(sorted(CLASSES_10))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 25, "test": 5}
    pixels = np.concatenate([pixels for pixels, _ in TRAIN_10.values()])
    labels = [RANK_10[label] for _, batch in TRAIN_10.values() for label in batch]
    train = source.splits["train"]
    assert train.labels.tolist() == labels
    assert train.names[24] == f"train/{source.classes[labels[24]]}/00024.png"
    for index in range(25):
        assert np.array_equal(decode_png(train.read(index)), pixels[index].reshape(3, 32, 32).transpose(1, 2, 0))
    test = source.splits["test"]
    assert test.labels.tolist() == [RANK_10[label] for label in TEST_10[1]]
    assert np.array_equal(decode_png(test.read(4)), TEST_10[0][4].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("parent", [False, True])
def test_binary_cifar10(tmp_path: Path, parent: bool) -> None:
    folder = write_binary_10(tmp_path / "data" / "cifar-10-batches-bin")
    check_10(folder.parent if parent else folder)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_cifar10(tmp_path: Path, protocol: int) -> None:
    folder = write_pickles_10(tmp_path / "data" / "cifar-10-batches-py", protocol)
    check_10(folder)
    check_10(folder.parent)


def test_pickles_as_torchvision_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_pickles_10(tmp_path / "cifar-10-batches-py")
    source = open_source(tmp_path)
    for name, train in (("train", True), ("test", False)):
        oracle, split = datasets.CIFAR10(tmp_path, train=train), source.splits[name]
        assert len(oracle) == len(split)
        for index, (image, label) in enumerate(oracle):
            assert np.array_equal(np.asarray(image), decode_png(split.read(index)))
            assert oracle.classes[label] == split.classes[split.labels[index]]


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    binary, pickles = tmp_path / "b" / "cifar-100-binary", tmp_path / "p" / "cifar-100-python"
    for folder in (binary, pickles):
        folder.mkdir(parents=True)
    for name, (pixels, labels) in (("train", TRAIN_100), ("test", TEST_100)):
        coarse = np.full((len(labels), 1), 19, np.uint8)
        records = np.concatenate([coarse, np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (binary / f"{name}.bin").write_bytes(records.tobytes())
        content = {"fine_labels": labels, "coarse_labels": [19] * len(labels), "data": pixels}
        (pickles / name).write_bytes(pickle.dumps(content, protocol=2))
    (binary / "fine_label_names.txt").write_text("\n".join(CLASSES_100))
    (binary / "coarse_label_names.txt").write_text("\n".join("abcdefghijklmnopqrst"))
    (pickles / "meta").write_bytes(pickle.dumps({"fine_label_names": CLASSES_100}, protocol=2))
    for path in (binary, pickles, binary.parent, pickles.parent):
        source = open_source(path)
        assert source.kind == "CIFAR-100"
        assert source.classes == tuple(reversed(CLASSES_100))
        assert source.splits["train"].labels.tolist() == [99 - label for label in TRAIN_100[1]]
        pixels = TEST_100[0][3].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(decode_png(source.splits["test"].read(3)), pixels)


@pytest.mark.parametrize("write", [write_binary_10, write_pickles_10])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_worker_processes(tmp_path: Path, write: Any, method: str) -> None:
    split = open_source(write(tmp_path / "data")).splits["train"]
    assert len(pickle.dumps(split)) < 4000  # names and labels, not pixels
    assert_reads_in_processes(split, method)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no pickle of arrays"),
        (pickle.dumps({"data": TEST_10[0], "labels": TEST_10[1]}, protocol=2)[:-2000], "is no pickle of arrays"),
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({"labels": [1]}), "is damaged: expected 'data', uint8"),
        (pickle.dumps({"data": TEST_10[0], "labels": [1]}), "is damaged: expected 'data', uint8"),
        (pickle.dumps({"data": TEST_10[0], "labels": ["1"] * 5}), "is damaged: expected 'data', uint8"),
        (pickle.dumps({"data": TEST_10[0], "labels": [1 << 70] * 5}), "is damaged: expected 'data', uint8"),
        (pickle.dumps({"data": TEST_10[0][:0], "labels": []}), "is damaged: expected 'data', uint8"),
        (pickle.dumps({"data": TEST_10[0], "labels": [10] * 5}), "is damaged: labels from 10 to 10 for 10 classes"),
    ],
)
def test_damaged_pickles(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_pickles_10(tmp_path / "data")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(folder)


def test_damaged_or_missing_binaries(tmp_path: Path) -> None:
    folder = write_binary_10(tmp_path / "data")
    (folder / "data_batch_4.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(ValueError, match="has 6145 bytes, which is no multiple of 3073"):
        open_source(folder)
    (folder / "data_batch_4.bin").unlink()
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 but lacks data_batch_4.bin, test_batch.bin"):
        open_source(folder)


def test_damaged_class_names(tmp_path: Path) -> None:
    folder = write_binary_10(tmp_path / "data")
    (folder / "batches.meta.txt").write_text("same\nsame\n")
    with pytest.raises(ValueError, match="class names are missing or not distinct"):
        open_source(folder)
    folder = write_pickles_10(tmp_path / "pickles")
    for names, message in ((None, "no list of texts"), ([b"a"] * 10, "no list of texts"), (["\ud800"], "is no text")):
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=4))
        with pytest.raises(ValueError, match=message):
            open_source(folder)


def test_a_folder_with_several_data_sets(tmp_path: Path) -> None:
    write_binary_10(tmp_path / "cifar-10-batches-bin")
    write_pickles_10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match=r"holds several data sets; give one of .*-bin, .*-py"):
        open_source(tmp_path)
