"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), as binary files or as the pickles that torchvision keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.array_pickles import load_array_pickle
from dataset_tools.sources.raw_pixels import (
    PixelSplit,
    RecordSplit,
    read_lines,
    read_records,
    remap,
    require_files,
)
from dataset_tools.sources.split import ImageSource, Split

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


@dataclass(frozen=True)
class Variant:
    """One of the forms in which CIFAR is published."""

    kind: str
    train: tuple[str, ...]
    test: str
    class_names: str
    label_bytes: int = 0
    """This many stand before the pixels of a record; the last one is the (fine) label. 0: pickles."""
    label_key: str = ""
    class_names_key: str = ""


VARIANTS = (
    Variant("CIFAR-10", tuple(f"{name}.bin" for name in BATCHES), "test_batch.bin", "batches.meta.txt", 1),
    Variant("CIFAR-100", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    Variant("CIFAR-10", BATCHES, "test_batch", "batches.meta", 0, "labels", "label_names"),
    Variant("CIFAR-100", ("train",), "test", "meta", 0, "fine_labels", "fine_label_names"),
)


def open_cifar(folder: Path) -> ImageSource | None:
    """CIFAR's splits train and test, in the stored order; None if `folder` is none of the VARIANTS.

    Labels of CIFAR-100 are the fine ones. Raises FileNotFoundError if files are missing, ValueError if one is
    damaged, or if a pickle asks for anything but arrays.
    """
    marks = ((variant, folder / variant.class_names, folder / variant.train[0]) for variant in VARIANTS)
    variant = next((variant for variant, names, train in marks if names.is_file() and train.is_file()), None)
    if variant is None:
        return None
    require_files(folder, [*variant.train, variant.test, variant.class_names], variant.kind)
    names_file = folder / variant.class_names
    if variant.label_bytes:
        stored_classes = read_lines(names_file)
    else:
        stored_classes = load_array_pickle(names_file).get(variant.class_names_key, [])
        if not isinstance(stored_classes, list) or not all(isinstance(name, str) for name in stored_classes):
            raise ValueError(f"{names_file} is damaged: its {variant.class_names_key!r} are no list of texts")
    splits: dict[str, Split] = {}
    for split, files in (("train", variant.train), ("test", (variant.test,))):
        paths = [folder / file for file in files]
        make = _binary_split if variant.label_bytes else PickledSplit
        splits[split] = make(split, paths, variant, stored_classes)
    classes = splits["train"].classes
    return ImageSource(path=folder, kind=variant.kind, splits=splits, classes=classes)


def _binary_split(name: str, paths: list[Path], variant: Variant, stored_classes: list[str]) -> RecordSplit:
    header = variant.label_bytes
    records = [read_records(path, header + PIXEL_BYTES) for path in paths]
    stored = np.concatenate([record[:, header - 1] for record in records]).astype(np.int64)
    labels, classes = remap(stored, stored_classes, paths[0].parent)
    return RecordSplit(name, labels, classes, files=paths, header=header, side=SIDE)


class PickledSplit(PixelSplit):
    """Images in pickles, which each process keeps in memory: 3 kB an image."""

    def __init__(self, name: str, paths: list[Path], variant: Variant, stored_classes: list[str]) -> None:
        self.paths, self.label_key = paths, variant.label_key
        batches = [_read_batch(path, self.label_key) for path in paths]
        stored = np.concatenate([labels for _, labels in batches])
        super().__init__(name, *remap(stored, stored_classes, paths[0].parent))
        self._data: NDArray[np.uint8] | None = np.concatenate([data for data, _ in batches])

    def pixels(self, index: int) -> NDArray[np.uint8]:
        if self._data is None:
            self._data = np.concatenate([_read_batch(path, self.label_key)[0] for path in self.paths])
        planes: NDArray[np.uint8] = self._data[index].reshape(3, SIDE, SIDE)
        return planes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}


def _read_batch(path: Path, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 [N, 3072] and int64 [N]. Raises ValueError if the pickle holds anything else."""
    batch = load_array_pickle(path)
    data, labels = batch.get("data"), batch.get(label_key)
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or not isinstance(labels, list)
        or not labels
        or data.shape != (len(labels), PIXEL_BYTES)
        or not all(isinstance(label, int) and 0 <= label < 256 for label in labels)
    ):
        raise ValueError(
            f"{path} is damaged: expected 'data', uint8 [N, {PIXEL_BYTES}], and {label_key!r}, N integers from 0 to 255"
        )
    return data, np.array(labels, dtype=np.int64)
