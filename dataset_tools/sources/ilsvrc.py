"""ImageNet (ILSVRC2012) as it is published: image-net.org's tars, or Kaggle's tree; nothing is unpacked.

    ILSVRC2012_img_train.tar  ILSVRC2012_img_val.tar  [ILSVRC2012_img_test*.tar]  ILSVRC2012_devkit_t12.tar.gz
    ILSVRC/Data/CLS-LOC/{train/WNID/,val/,test/}*.JPEG  LOC_val_solution.csv  LOC_synset_mapping.txt

Labels are ranks of the sorted WNIDs: the class_to_idx of torchvision's ImageNet.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset_tools.files import ByteFile
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.ilsvrc_labels import (
    MAPPING,
    SOLUTION,
    WHAT_TO_PUT,
    find_validation_labels,
)
from dataset_tools.sources.image_folder import FolderSplit, open_image_folder
from dataset_tools.sources.layout import first_few, is_hidden, is_image
from dataset_tools.sources.split import UNLABELED, ExtentSplit, ImageSource, Split
from dataset_tools.sources.tar_archive import open_tar, read_index

logger = logging.getLogger(__name__)

TRAIN_TAR, VAL_TAR, TEST_TARS = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_img_test*.tar"
FLAT_IMAGE = re.compile(r"ILSVRC2012_(val|test)_\d{8}\.JPEG")
"""A validation or test image; those of train are in class folders, or tars."""
KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


def open_any_tar(archive: Path) -> ImageSource:
    """ILSVRC2012_img_val.tar, with the labels that lie beside it, or ILSVRC2012_img_test*.tar, unlabelled, if the first
    image of the tar is called so; else what `open_tar` makes of it (also of ILSVRC2012_img_train.tar).

    Raises ValueError for missing or wrong labels, and like `open_tar`; RuntimeError if scipy is missing.
    """
    read = read_index(archive)
    names = read[1].names
    match = FLAT_IMAGE.fullmatch(os.path.basename(names[0])) if len(names) else None
    if match is None:
        return open_tar(archive, read)
    split = _flat_split(archive, match[1], ())
    return ImageSource(path=archive, kind="ILSVRC2012", splits={split.name: split}, classes=split.classes)


def open_ilsvrc_folder(folder: Path) -> ImageSource | None:
    """A folder with image-net.org's tars, or Kaggle's tree (its top, `ILSVRC` or `CLS-LOC`); None if neither.

    Raises ValueError if labels are missing or do not fit the images, if val has classes that train lacks, or
    for a damaged file; RuntimeError if scipy is missing.
    """
    return _open_tars(folder) or _open_tree(folder)


def _open_tars(folder: Path) -> ImageSource | None:
    train, val = folder / TRAIN_TAR, folder / VAL_TAR
    if not (train.is_file() or val.is_file()):
        return None
    tests = sorted(folder.glob(TEST_TARS))
    tars = [path for path in (train, val, *tests) if path.is_file()]
    if unpacked := [name for name in ("train", "val") if (folder / name).is_dir() and any((folder / name).iterdir())]:
        names = first_few([path.name for path in tars])
        logger.warning("%s: left out, being beside the unpacked %s: %s", folder, " and ".join(unpacked), names)
        return None
    if len(tests) > 1:
        raise ValueError(f"{folder} holds {first_few([path.name for path in tests])}, which are one split: keep one.")
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] = ()
    if train in tars:
        source = open_tar(train)
        if list(source.splits) != ["train"] or not source.classes:
            raise ValueError(f"{train} must hold one tar for each class, or a folder for each, but it is: {source}")
        splits, classes = dict(source.splits), source.classes
    if val in tars:
        splits["val"] = _flat_split(val, "val", classes)
        classes = splits["val"].classes
    if tests:
        splits["test"] = _flat_split(tests[0], "test", classes)
    return ImageSource(path=folder, kind="ILSVRC2012", splits=splits, classes=classes)


def _open_tree(folder: Path) -> ImageSource | None:
    """The `CLS-LOC` folder of Kaggle's archive, or any that has the validation images right inside val/."""
    trees = [folder / name for name in KAGGLE_TREES]
    tree = next((tree for tree in trees if (tree / "train").is_dir() or (tree / "val").is_dir()), folder)
    flat = _first_file(tree / "val")
    if not (flat and FLAT_IMAGE.fullmatch(flat)):
        return None if tree is folder else replace(open_image_folder(tree), path=folder, kind="ILSVRC2012")
    place = tree.resolve()
    is_kaggle = (place.parent.name, place.name) == ("Data", "CLS-LOC")
    above = place.parents[:3] if is_kaggle else ()
    labels = find_validation_labels([tree, *above])
    if labels is None and is_kaggle:
        raise ValueError(
            f"{tree}/val holds images without class folders, and {SOLUTION}, which has their labels, is missing. "
            f"Put it, and {MAPPING}, where Kaggle has them: beside ILSVRC/, into {place.parents[2]}."
        )
    source = open_image_folder(tree)
    val = source.splits.get("val")
    if not isinstance(val, FolderSplit) or (val.labels != UNLABELED).any():
        raise ValueError(f"{tree}/val holds images right inside, such as {flat}, and class folders: keep one of them.")
    if labels is None:
        source.account.notes.append(f"{tree}/val is unlabelled: to have its labels, put into {tree} {WHAT_TO_PUT}")
        return source
    classes = source.classes or labels.classes
    stems = [Path(name).stem for name in val.names]
    splits: dict[str, Split] = {}
    for name, split in source.splits.items():
        assert isinstance(split, FolderSplit)
        ranks = labels.ranks(stems, classes, tree / "val") if name == "val" else split.labels
        splits[name] = FolderSplit(name, split.root, split.names, ranks, classes)
    return ImageSource(path=folder, kind="ILSVRC2012", splits=splits, classes=classes, account=source.account)


def _flat_split(archive: Path, split: str, train_classes: tuple[str, ...]) -> ExtentSplit:
    """All images of a tar without classes, by name, whatever folder they are in; those of val with their labels."""
    folder, classes = archive.absolute().parent, train_classes
    known = find_validation_labels([folder]) if split == "val" else None
    if known:
        classes = train_classes or known.classes
    elif split == "val":
        raise ValueError(
            f"{archive} has validation images, but their labels are missing. Put {WHAT_TO_PUT} into {folder}."
        )
    tar, index = read_index(archive)
    base_names = [os.path.basename(name) for name in index.names]
    if strangers := [name for name in base_names if (m := FLAT_IMAGE.fullmatch(name)) is None or m[1] != split]:
        raise ValueError(f"{archive} must hold images ILSVRC2012_{split}_*.JPEG only, not {first_few(strangers)}")
    if known:
        labels = known.ranks([name.removesuffix(".JPEG") for name in base_names], classes, archive)
    else:
        labels = np.full(len(base_names), UNLABELED, dtype=np.int64)
    order = np.argsort(base_names)
    names = PackedNames(f"{split}/{base_names[number]}" for number in order)
    return ExtentSplit(split, (ByteFile(tar),), names, index.extents[order], labels[order], classes)


def _first_file(folder: Path) -> str | None:
    """The name of one image right inside `folder`; None if there is none, or no folder."""
    if not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        return next((entry.name for entry in entries if is_image(entry.name) and not is_hidden(entry.name)), None)
