"""The data sets of transfer learning: where they lie, how they are split, and which accuracy the literature reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.limits import unknown
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import ImageSource, Split, open_source
from dataset_tools.sources.birdsnap import LISTS, open_birdsnap
from dataset_tools.sources.image_folder import FolderSplit
from dataset_tools.sources.layout import first_few
from leoclr_fast.evaluate.protocols import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSet:
    """A data set as it was published."""

    title: str
    metric: Metric
    """As Kornblith, Shlens and Le (2019) and SimCLR report it."""
    classes: int
    train_images: int
    test_images: int
    layout: str
    """What it looks like on disk."""


TRANSFER_SETS = {
    "cifar10": TransferSet(
        title="CIFAR-10",
        metric="top1",
        classes=10,
        train_images=50_000,
        test_images=10_000,
        layout="cifar-10-batches-py/ or cifar-10-batches-bin/",
    ),
    "cifar100": TransferSet(
        title="CIFAR-100",
        metric="top1",
        classes=100,
        train_images=50_000,
        test_images=10_000,
        layout="cifar-100-python/ or cifar-100-binary/",
    ),
    "cars": TransferSet(
        title="Stanford Cars",
        metric="top1",
        classes=196,
        train_images=8_144,
        test_images=8_041,
        layout="stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat",
    ),
    "pets": TransferSet(
        title="Oxford-IIIT Pets",
        metric="mean_per_class",
        classes=37,
        train_images=3_680,
        test_images=3_669,
        layout="oxford-iiit-pet/ with images/ and annotations/",
    ),
    "birdsnap": TransferSet(
        title="Birdsnap",
        metric="top1",
        classes=500,
        train_images=47_386,
        test_images=2_443,
        layout=f"{', '.join(LISTS)} and download/images/",
    ),
}


_CIFAR_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferData:
    """Train and test of one of the sets, with all that must be said about them."""

    path: Path
    train: Split
    test: Split
    fingerprint: str
    missing: tuple[str, ...]
    """Names in the published lists whose images are not there: Birdsnap's."""
    notes: tuple[str, ...]
    """In what it is not what was published."""

    def describe(self) -> dict[str, Any]:
        """The fields of a result about its data."""
        return {
            "data": str(self.path),
            "classes": len(self.train.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "missing_images": len(self.missing),
            "notes": list(self.notes),
        }


def open_transfer_data(name: str, path: Path) -> TransferData:
    """One of `TRANSFER_SETS`, as torchvision lays it out on disk, or any source of its images with train and test.

    path: the set's own folder, or the one around it.
    Raises ValueError for an unknown name, another number of classes, images that are missing (but for Birdsnap's), or
    a class without train images; FileNotFoundError if it is not there.
    """
    if name not in TRANSFER_SETS:
        raise ValueError(unknown("transfer data set", name, TRANSFER_SETS))
    published = TRANSFER_SETS[name]
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; {published.title} is expected there: {published.layout}")
    source, missing = _open(name, path)
    train, test = source.splits.get("train"), source.splits.get("test", source.splits.get("val"))
    if train is None or test is None:
        raise ValueError(
            f"{path} has {', '.join(source.splits) or 'no splits'}, but {published.title} needs train and test; "
            f"expected is {published.layout}, or any source of images with these two splits"
        )
    if len(source.classes) != published.classes:
        raise ValueError(
            f"{path} has {len(source.classes)} classes, but {published.title} has {published.classes}: it is another "
            f"data set, or a part of it. Expected is {published.layout}"
        )
    counts = np.bincount(train.labels, minlength=len(source.classes))
    empty = [label for label, count in zip(source.classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"no train image of {published.title} in {path} is of the classes {first_few(empty)}")
    notes = []
    for split, given, wanted in (
        ("train", train, published.train_images),
        ("test", test, published.test_images),
    ):
        if len(given) != wanted:
            notes.append(f"{split} has {len(given):,} images, and {wanted:,} as published")
    absent = len(source.classes) - len(np.unique(test.labels))
    if absent:
        notes.append(f"{absent} classes have no test image, and do not count in the mean per class")
    return TransferData(
        path=path, train=train, test=test, fingerprint=source.fingerprint, missing=missing, notes=tuple(notes)
    )


def _open(name: str, path: Path) -> tuple[ImageSource, tuple[str, ...]]:
    """The source, and the names of the images that are not there."""
    if name in ("cars", "pets"):
        folder, inside = ("stanford_cars", "devkit") if name == "cars" else ("oxford-iiit-pet", "annotations")
        # What torchvision calls root is the folder around it, whichever of the two was given.
        if (path / folder / inside).is_dir():
            return _from_torchvision(name, path, folder), ()
        if path.name == folder and (path / inside).is_dir():
            return _from_torchvision(name, path.parent, folder), ()
    if name == "birdsnap" and any((path / listed).is_file() for listed in LISTS):
        birdsnap = open_birdsnap(path)
        return birdsnap.source, tuple(
            f"{split} {image}" for split, images in birdsnap.missing.items() for image in images
        )
    own = (path / folder for folder in _CIFAR_FOLDERS.get(name, ()))
    return open_source(next((folder for folder in own if folder.is_dir()), path)), ()


def _from_torchvision(name: str, root: Path, folder: str) -> ImageSource:
    """Stanford Cars or Oxford-IIIT Pets, whose lists torchvision reads."""
    from torchvision.datasets import OxfordIIITPet, StanfordCars

    published = TRANSFER_SETS[name]
    samples: dict[str, list[tuple[str, int]]] = {}
    dataset: Any = None
    for split in ("train", "test"):
        try:
            if name == "cars":
                dataset = StanfordCars(str(root), split=split)
                samples[split] = [(str(image), int(label)) for image, label in dataset._samples]
            else:
                dataset = OxfordIIITPet(str(root), split="trainval" if split == "train" else split)
                pairs = zip(dataset._images, dataset._labels, strict=True)
                samples[split] = [(str(image), int(label)) for image, label in pairs]
        except Exception as error:  # what scipy raises for a damaged .mat is not documented
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{published.title} in {root} is not whole ({reason}); expected is {published.layout}"
            ) from error
    return _listed_source(root / folder, published.title, samples, tuple(str(label) for label in dataset.classes))


def _listed_source(
    folder: Path, kind: str, samples: dict[str, list[tuple[str, int]]], classes: tuple[str, ...]
) -> ImageSource:
    """The images of lists: split → (path, label). Raises ValueError if one is not there."""
    splits: dict[str, Split] = {}
    for split, listed in samples.items():
        names = [str(Path(image).relative_to(folder)) for image, _ in listed]
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{len(absent):,} of the {len(names):,} {split} images of {kind} are not in {folder}: "
                f"{first_few(absent)}"
            )
        labels = np.array([label for _, label in listed], dtype=np.int64)
        splits[split] = FolderSplit(split, folder, PackedNames(names), labels, classes)
    return ImageSource(path=folder, kind=kind, splits=splits, classes=classes)
