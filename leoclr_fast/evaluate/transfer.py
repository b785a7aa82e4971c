"""Fine-tuning on other data sets: `leoclr-fast transfer`; where they lie, and which accuracy the literature reports."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from dataset_tools.files import read_file
from dataset_tools.limits import unknown
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import ImageSource, Split, open_source
from dataset_tools.sources.birdsnap import LISTS, open_birdsnap
from dataset_tools.sources.image_folder import FolderSplit
from dataset_tools.sources.layout import first_few
from dataset_tools.sources.raw_pixels import check_mat
from dataset_tools.subsets import limited
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.data import LabelledData, lacking, require_every_class
from leoclr_fast.evaluate.evaluation import evaluation_of
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, grid_search
from leoclr_fast.evaluate.protocols import Metric, TrainingOptions, TransferProtocol

log = logging.getLogger(__name__)


class TransferSet(NamedTuple):
    """A data set as it was published."""

    title: str
    metric: Metric
    """As Kornblith, Shlens and Le (2019) and SimCLR report it."""
    classes: int
    train_images: int
    test_images: int
    layout: str
    """What it looks like on disk."""


_CARS = "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
TRANSFER_SETS = {
    "cifar10": TransferSet("CIFAR-10", "top1", 10, 50_000, 10_000, "cifar-10-batches-py/ or cifar-10-batches-bin/"),
    "cifar100": TransferSet("CIFAR-100", "top1", 100, 50_000, 10_000, "cifar-100-python/ or cifar-100-binary/"),
    "cars": TransferSet("Stanford Cars", "top1", 196, 8_144, 8_041, _CARS),
    "pets": TransferSet(
        "Oxford-IIIT Pets", "mean_per_class", 37, 3_680, 3_669, "oxford-iiit-pet/ with images/ and annotations/"
    ),
    "birdsnap": TransferSet("Birdsnap", "top1", 500, 47_386, 2_443, f"{', '.join(LISTS)} and download/images/"),
}
_CIFAR_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}


def run(
    weights: Path,
    dataset: str,
    data: Path,
    protocol: TransferProtocol,
    options: TrainingOptions,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune a run's network, or that of a file of weights, on `dataset`, one of `TRANSFER_SETS`.

    Returns top1, top5 and mean_per_class (percent, on test), metric (the one of them that the literature reports), lr
    and weight_decay (the chosen ones), grid, what it was made of, and as `Evaluation.result`.
    Raises ValueError for what the user can mend.
    """
    with evaluation_of(weights, options, console) as evaluation:
        whole = open_transfer_data(dataset, data)
        if whole.note:
            log.warning("%s: %s", whole.kind, whole.note)
        train, test = limited(whole.train, options.max_images), limited(whole.val, options.max_images)
        trials = tuple(
            Hyperparameters(
                lr=lr,
                weight_decay=weight_decay / lr,
                batch_size=protocol.batch_size,
                batchnorm_momentum=None,
                seed=protocol.seed,
            )
            for lr in protocol.lr_grid
            for weight_decay in protocol.weight_decay_grid
        )

        def compute(folder: Path) -> dict[str, Any]:
            data, metric = replace(whole, train=train, val=test), TRANSFER_SETS[dataset].metric
            found = grid_search(evaluation, folder, data, trials, metric=metric, steps=protocol.steps)
            return found | {"dataset": dataset}

        settings = {"dataset": dataset, **as_plain(protocol), **evaluation.view_settings(whole.fingerprint)}
        return evaluation.result("transfer", settings, compute)


def open_transfer_data(name: str, path: Path) -> LabelledData:
    """One of `TRANSFER_SETS`, as torchvision lays it out on disk, or any source of its images with train and test.

    path: the set's own folder, or the one around it. The note says in what it is not what was published.
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
    require_every_class(train, str(path), f"Expected is {published.title}: {published.layout}")
    notes = [
        f"{split.name} has {len(split):,} images, and {wanted:,} as published."
        for split, wanted in ((train, published.train_images), (test, published.test_images))
        if len(split) != wanted
    ]
    if missing:
        notes.append(f"{len(missing):,} images of its lists are not there: {first_few(missing)}.")
    return LabelledData(
        path=path,
        kind=published.title,
        train=train,
        val=test,
        fingerprint=source.fingerprint,
        note=" ".join([*notes, lacking(test)]).strip(),
    )


def _open(name: str, path: Path) -> tuple[ImageSource, list[str]]:
    """The source, and the names of the images that are not there."""
    if name in ("cars", "pets"):
        folder, inside = ("stanford_cars", "devkit") if name == "cars" else ("oxford-iiit-pet", "annotations")
        for own in (path / folder, path):  # what torchvision calls root is the folder around it
            if own.name == folder and (own / inside).is_dir():
                return _from_torchvision(name, own), []
    if name == "birdsnap" and any((path / listed).is_file() for listed in LISTS):
        birdsnap = open_birdsnap(path)
        return birdsnap.source, [f"{split} {image}" for split, own in birdsnap.missing.items() for image in own]
    cifars = (path / folder for folder in _CIFAR_FOLDERS.get(name, ()))
    return open_source(next((folder for folder in cifars if folder.is_dir()), path)), []


def _from_torchvision(name: str, folder: Path) -> ImageSource:
    """Stanford Cars or Oxford-IIIT Pets, whose lists torchvision reads. Raises ValueError if an image is not there."""
    from torchvision.datasets import OxfordIIITPet, StanfordCars

    published, splits = TRANSFER_SETS[name], dict[str, Split]()
    for split in ("train", "test"):
        dataset: Any
        try:
            for path in (*folder.glob("*.mat"), *folder.glob("devkit/*.mat"), *folder.glob("annotations/*.txt")):
                content = read_file(path)  # raises for a pipe, which torchvision would wait for
                if path.suffix == ".mat":
                    check_mat(content, path.name)
            if name == "cars":
                dataset = StanfordCars(folder.parent, split=split)
                images, labels = zip(*dataset._samples, strict=True)
            else:
                dataset = OxfordIIITPet(folder.parent, split="trainval" if split == "train" else split)
                images, labels = dataset._images, dataset._labels
        except Exception as error:  # what scipy raises for a damaged .mat is not documented
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{published.title} in {folder.parent} is not whole ({reason}); expected is {published.layout}"
            ) from error
        names = [str(Path(image).relative_to(folder)) for image in images]
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{len(absent):,} of the {len(names):,} {split} images of {published.title} are not in {folder}: "
                f"{first_few(absent)}"
            )
        classes = tuple(str(label) for label in dataset.classes)
        splits[split] = FolderSplit(split, folder, PackedNames(names), np.array(labels, dtype=np.int64), classes)
    return ImageSource(path=folder, kind=published.title, splits=splits, classes=classes)
