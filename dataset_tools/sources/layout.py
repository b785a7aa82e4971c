"""Which split and which class the images of a folder are: the rules that image folders and tars share.

    [split/]CLASS/**/name.ext

Split folders are `train`, `val` (or `valid`, `validation`), `test` and `unlabeled`. They count as such if
there is no other folder beside them, or if one of them holds folders: in `bus/ car/ train/`, with images
right inside, `train` is a class. Names that start with "." (and `__MACOSX`) are ignored, unlike in
torchvision.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dataset_tools.sources.split import SPLIT_ORDER, UNLABELED

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision.datasets.folder.IMG_EXTENSIONS; case does not matter."""

SPLIT_NAMES = {name: name for name in SPLIT_ORDER} | {"valid": "val", "validation": "val"}


@dataclass(frozen=True)
class Layout:
    """The classes, and for each split its folders with their labels, in the order of torchvision's
    ImageFolder.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def lay_out(folders: Mapping[str, int], where: str) -> Layout:
    """Says what each folder is. `folders`: path relative to the source ("" its root) → images right inside.

    A class folder without images stays in the class list (torchvision raises). Images beside class folders,
    and folders beside split folders, are left out with a warning. Raises ValueError, beginning with `where`,
    if there is no image, if two folders mean the same split, or if val or test has classes that train lacks.
    """
    if not any(folders.values()):
        raise ValueError(
            f"{where} holds no image. Expected [train/|val/|test/]CLASS/name.ext, unlabeled/name.ext, or "
            f"images right inside; extensions: {' '.join(IMAGE_EXTENSIONS)}."
        )
    trees: dict[str, list[tuple[str, str]]] = {}  # split → (class name or "", folder)
    for split, root in _split_roots(folders, where).items():
        prefix = f"{root}/" if root else ""
        inside = {folder: count for folder, count in folders.items() if f"{folder}/".startswith(prefix)}
        if any(inside.values()):
            trees[split] = _with_class_names(split, root, inside, where)
        else:
            logger.warning("%s: its folder %r holds no image and is left out", where, root)

    class_names = {split: {name for name, _ in tree if name} for split, tree in trees.items()}
    classes = sorted(class_names.get("train") or set().union(*class_names.values()))
    for split, names in class_names.items():
        if strangers := sorted(names.difference(classes)):
            raise ValueError(
                f"{where}: {split} has {len(strangers)} class(es) that train lacks: {first_few(strangers)}. All "
                "splits share one class list: rename these folders or move them out."
            )
    rank = {name: label for label, name in enumerate(classes)} | {"": UNLABELED}
    return Layout(
        tuple(classes),
        {
            split: [(folder, rank[name]) for name, folder in sorted(tree) if folders[folder]]
            for split, tree in trees.items()
        },
    )


def _split_roots(folders: Mapping[str, int], where: str) -> dict[str, str]:
    """Split name → its folder, in the order of SPLIT_ORDER; {"train": ""} where there are no splits."""
    tops = {folder.split("/")[0] for folder in folders if folder}
    named = sorted(tops & SPLIT_NAMES.keys())
    others = sorted(tops - SPLIT_NAMES.keys())
    if not named or (others and not any("/" in folder and folder.split("/")[0] in named for folder in folders)):
        return {"train": ""}
    if others:
        logger.warning("%s: left out, being beside %s: %s", where, first_few(named), first_few(others))
    roots: dict[str, str] = {}
    for top in named:
        if (split := SPLIT_NAMES[top]) in roots:
            raise ValueError(f"{where} holds {roots[split]!r} and {top!r}, which mean the same split: keep one.")
        roots[split] = top
    return {split: roots[split] for split in SPLIT_ORDER if split in roots}


def _with_class_names(split: str, root: str, inside: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """(class name, folder) for each folder of a split; the class name is "" for all where nothing is
    labelled.
    """
    depth = len(root) + 1 if root else 0
    named = [(folder[depth:].split("/")[0], folder) for folder in inside]
    if split == "unlabeled" or not any(name and inside[folder] for name, folder in named):
        return [("", folder) for folder in inside]
    if inside.get(root):
        logger.warning("%s: left out, being in no class folder: %d images in %r", where, inside[root], root or ".")
    return [(name, folder) for name, folder in named if name]


def first_few(names: Collection[str]) -> str:
    """Ten of the names at most, for a message."""
    return ", ".join(list(names)[:10]) + (f" … ({len(names)} in all)" if len(names) > 10 else "")
