"""Which split and which class the images of a folder are: the rules that image folders and tars share.

    [top/][split/]CLASS/**/name.ext

Split folders are called `train`, `val`, `test` or `unlabeled`, or as in SPLIT_NAMES, in any case. They count as such if
there is no other folder beside them, or if one of them holds folders: in `bus/ car/ train/`, with images right inside,
`train` is a class. One folder around everything is looked through. What file systems and editors leave behind
(`is_hidden`) is ignored, unlike in torchvision. Images without class folders whose names say what they are
(ImageNet's WNIDs) are labelled by these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.sources.split import SPLIT_ORDER, UNLABELED

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's IMG_EXTENSIONS
    *(".jpe", ".jfif", ".gif", ".jp2", ".avif"),
)
"""Case does not matter."""
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"},
}
_LEFT_BEHIND = {
    *("__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin", "#recycle", "@recycle"),
    *("@eadir", "@tmp", "#snapshot", "thumbs.db", "desktop.ini", "recycler", "network trash folder", "temporary items"),
    *("@recently-snapshot", "~snapshot", "@synoresource"),
}
_LIKE_SPLITS = {*SPLIT_NAMES, "trainset", "valset", "testset", "eval", "evaluation", "dev"}
"""Words in the name of a folder, such as seg_train, val2017 or "Test set", that make it a split more likely than a
class."""
_WNID = re.compile(r"(?:(n\d{8})_\d+|\w*_(n\d{8}))\.jpe?g", re.IGNORECASE)
"""n01440764_10026.JPEG, and n01440764_10026_n01440764.JPEG or ILSVRC2012_val_00000293_n01440764.JPEG of the hub."""


@dataclass(frozen=True)
class Layout:
    """The classes, and for each split its folders with their labels, in the order of torchvision's ImageFolder."""

    top: str
    """The folder around everything, with "/" at its end; "" if there is none."""
    classes: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]
    """The folders are below `top`."""


def split_of(name: str) -> str | None:
    """The split that a folder, or a word of a file's name, means; None if it means none."""
    return SPLIT_NAMES.get(name.lower())


def split_word(file_name: str) -> str | None:
    """The first word of a file name that means a split: "valid" in "tiny-valid-00000.parquet"."""
    return next(filter(split_of, re.split(r"[-_.]", file_name)), None)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def lay_out(folders: Mapping[str, int], where: str, account: Account) -> Layout:
    """Says what each folder is. `folders`: path relative to the source ("" its root) → images right inside.

    A class folder without images stays in the class list (torchvision raises). Images beside class folders, and folders
    beside split folders, are left out; `account` notes it. Raises ValueError, beginning with `where`, if there is no
    image, if two folders mean the same split, if val or test has classes that train lacks, or if folders that would be
    classes hold splits.
    """
    if not any(folders.values()):
        hint = "".join(
            f" {text.rstrip('.')}." for text in (str(account).replace("not read", "It holds"), *account.notes) if text
        )
        raise ValueError(
            f"{where} holds no image. Expected [train/|val/|test/]CLASS/name.ext, unlabeled/name.ext, or "
            f"images right inside; extensions: {' '.join(IMAGE_EXTENSIONS)}.{hint}"
        )
    top = _common_top(folders, where, account)
    folders = {folder[len(top) :]: count for folder, count in folders.items() if f"{folder}/".startswith(top)}
    trees: dict[str, list[tuple[str, str]]] = {}  # split → (class name or "", folder)
    for split, root in _split_roots(folders, where, account).items():
        prefix = f"{root}/" if root else ""
        inside = {folder: count for folder, count in folders.items() if f"{folder}/".startswith(prefix)}
        if any(inside.values()):
            trees[split] = _with_class_names(split, root, inside, where, account)
        else:
            account.notes.append(f"{where}: its folder {root!r} holds no image and is left out")

    class_names = {split: {name for name, _ in tree if name} for split, tree in trees.items()}
    classes = sorted(class_names.get("train") or set().union(*class_names.values()))
    refuse_strangers(class_names, classes, where)
    rank = {name: label for label, name in enumerate(classes)} | {"": UNLABELED}
    if empty := sorted(
        set(classes).difference(name for tree in trees.values() for name, each in tree if folders[each])
    ):
        account.notes.append(f"{where}: {len(empty)} of its {len(classes)} classes hold no image: {first_few(empty)}")
    return Layout(
        top,
        tuple(classes),
        {
            split: [(folder, rank[name]) for name, folder in sorted(tree) if folders[folder]]
            for split, tree in trees.items()
        },
    )


def refuse_strangers(class_names: Mapping[str, Collection[str]], classes: Collection[str], where: str) -> None:
    """Raises ValueError if a split has classes (`class_names`: of each split) that are not among `classes`."""
    for split, names in class_names.items():
        if strangers := sorted(set(names).difference(classes)):
            raise ValueError(
                f"{where}: {split} has {len(strangers)} class(es) that train lacks: {first_few(strangers)}. All "
                "splits share one class list: rename these, or take them out."
            )


def label_by_name(
    splits: Mapping[str, tuple[Sequence[str], NDArray[np.int64]]], classes: tuple[str, ...]
) -> tuple[dict[str, NDArray[np.int64]], tuple[str, ...]]:
    """The labels of each split, and the classes, where the names of unlabelled images tell their WNIDs.

    `splits`: names and labels as the folders have them. Nothing changes unless each image of an unlabelled split has a
    WNID, one of `classes` if there are any.
    """
    labels = {split: given for split, (_, given) in splits.items()}
    found: dict[str, list[str]] = {}
    for split, (names, given) in splits.items():
        wnids: list[str] = []
        for name in names if (given == UNLABELED).all() else ():
            match = _WNID.fullmatch(name.rpartition("/")[2])
            if match is None:
                break
            wnids.append((match[1] or match[2]).lower())
        if len(wnids) == len(names) and (not classes or set(wnids) <= set(classes)):
            found[split] = wnids
    if not classes:
        of_train = set(found.get("train") or [wnid for wnids in found.values() for wnid in wnids])
        classes = tuple(sorted(of_train))
    rank = {name: label for label, name in enumerate(classes)}
    for split, wnids in found.items():
        if rank.keys() >= set(wnids):
            labels[split] = np.array([rank[wnid] for wnid in wnids], dtype=np.int64)
    return labels, classes


def _common_top(folders: Mapping[str, int], where: str, account: Account) -> str:
    """The folder around all images, with "/" at its end; "" if there is none, or if it is a split or a class."""
    holding = [folder for folder, count in folders.items() if count]
    tops = {folder.split("/")[0] for folder in holding}
    top = min(tops)
    if len(tops) > 1 or split_of(top) or not all("/" in folder for folder in holding):
        return ""
    others = sorted({folder.split("/")[0] for folder in folders} - {"", top})
    if others and not any(split_of(folder.split("/")[1]) for folder in holding):
        return ""
    if others:
        account.notes.append(f"{where}: left out, being beside {top}, without an image: {first_few(others)}")
    return f"{top}/"


def _split_roots(folders: Mapping[str, int], where: str, account: Account) -> dict[str, str]:
    """Split name → its folder, in the order of SPLIT_ORDER; {"train": ""} where there are no splits."""
    tops = {folder.split("/")[0] for folder in folders if folder}
    named = sorted(filter(split_of, tops))
    others = sorted(tops.difference(named))
    if not named or (others and not any("/" in folder and folder.split("/")[0] in named for folder in folders)):
        _refuse_splits_as_classes(folders, where)
        return {"train": ""}
    if others:
        account.notes.append(f"{where}: left out, being beside {first_few(named)}: {first_few(others)}")
    if loose := folders.get(""):
        account.notes.append(f"{where}: left out, being beside {first_few(named)}: {loose:,} images")
    roots: dict[str, str] = {}
    for top in named:
        split = SPLIT_NAMES[top.lower()]
        if split in roots:
            raise ValueError(f"{where} holds {roots[split]!r} and {top!r}, which mean the same split: keep one.")
        roots[split] = top
    return {split: roots[split] for split in SPLIT_ORDER if split in roots}


def _refuse_splits_as_classes(folders: Mapping[str, int], where: str) -> None:
    """Raises ValueError if what would be classes are splits by their names, or hold splits."""
    holding = {folder.split("/")[0] for folder, count in folders.items() if count and folder}
    deep = {folder.split("/")[0] for folder, count in folders.items() if count and "/" in folder}
    like = sorted(top for top in holding if _LIKE_SPLITS.intersection(re.split(r"[^a-z]+", top.lower())))
    if len(like) > 1 and (deep.intersection(like) or len(like) == len(holding)):
        raise ValueError(
            f"{where}: its folders {first_few(like)} would be classes, and all of them trained on, but look like "
            "splits. Rename them train, val and test; or, if they are classes, so that they do not"
        )
    inside: dict[str, set[str]] = {}
    for folder, count in folders.items():
        top, _, rest = folder.partition("/")
        if count and (split := split_of(rest.split("/")[0])):
            inside.setdefault(top, set()).add(split)
    for top, splits in sorted(inside.items()):
        if len(splits) > 1:
            raise ValueError(
                f"{where}: its folder {top!r} holds {' and '.join(sorted(splits))} itself: it is a data set, no class, "
                f"and its {max(splits)} would be trained on. Give one data set, as that folder is."
            )


def _with_class_names(
    split: str, root: str, inside: Mapping[str, int], where: str, account: Account
) -> list[tuple[str, str]]:
    """(class name, folder) for each folder of a split; the class name is "" for all where nothing is
    labelled.
    """
    depth = len(root) + 1 if root else 0
    named = [(folder[depth:].split("/")[0], folder) for folder in inside]
    if split == "unlabeled" or not any(name and inside[folder] for name, folder in named):
        return [("", folder) for folder in inside]
    if inside.get(root):
        account.notes.append(f"{where}: left out, being in no class folder: {inside[root]} images in {root or '.'!r}")
    paths = [folder[depth:].split("/") for folder, count in inside.items() if count]
    classes, within = {path[0] for path in paths}, {path[1] for path in paths if len(path) > 1}
    if len(classes) == 1 and len(within) > 1 and [*classes] not in paths:
        account.notes.append(
            f"{where}: all images of {split} are of one class, {first_few(classes)}; if its folders "
            f"{first_few(sorted(within))} are the classes, take out the folder around them"
        )
    return [(name, folder) for name, folder in named if name]


def first_few(names: Collection[str]) -> str:
    """Ten of the names at most, for a message."""
    return ", ".join(list(names)[:10]) + (f" … ({len(names)} in all)" if len(names) > 10 else "")
