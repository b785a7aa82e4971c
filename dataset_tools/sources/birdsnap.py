"""Birdsnap (Berg et al., 2014), as its archive and its download script leave it: lists of images, many long gone.

images.txt, species.txt, test_images.txt, and the images that could be had below download/images/ or images/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.image_folder import FolderSplit
from dataset_tools.sources.raw_pixels import read_table
from dataset_tools.sources.split import ImageSource, Split

LISTS = ("images.txt", "species.txt", "test_images.txt")
_IMAGE_FOLDERS = ("download/images", "images")


@dataclass(frozen=True, kw_only=True)
class Birdsnap:
    """Its splits train and test without the images that are not there, and the names of those."""

    source: ImageSource
    missing: dict[str, tuple[str, ...]]
    """Split → names."""


def open_birdsnap(folder: Path) -> Birdsnap:
    """Reads the lists, and looks for every image in them.

    Raises FileNotFoundError if a list or the folder of images is missing, ValueError if a list is damaged or if no
    image of a split is there.
    """
    absent = [name for name in LISTS if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} is not Birdsnap: it lacks {', '.join(absent)}; give the folder that birdsnap.tgz unpacks to"
        )
    images = next((name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise FileNotFoundError(
            f"{folder} has no images: neither {' nor '.join(_IMAGE_FOLDERS)} is there; run Birdsnap's get_birdsnap.py"
        )
    species = {row["id"]: row["dir"] for row in read_table(folder / "species.txt", ("id", "dir"), "\t")}
    classes = tuple(sorted(species.values()))
    rank = {name: label for label, name in enumerate(classes)}
    test = {row["path"] for row in read_table(folder / "test_images.txt", ("path",), "\t")}
    found: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    missing: dict[str, list[str]] = {"train": [], "test": []}
    for row in read_table(folder / "images.txt", ("path", "species_id"), "\t"):
        split = "test" if row["path"] in test else "train"
        if row["species_id"] not in species:
            raise ValueError(f"{folder / 'images.txt'} is damaged: {row['path']} has the species {row['species_id']!r}")
        name = f"{images}/{row['path']}"
        if (folder / name).is_file():
            found[split].append((name, rank[species[row["species_id"]]]))
        else:
            missing[split].append(row["path"])
    splits: dict[str, Split] = {}
    for split, samples in found.items():
        if not samples:
            raise ValueError(f"none of the {len(missing[split]):,} {split} images of Birdsnap is in {folder / images}")
        samples.sort()
        labels = np.array([label for _, label in samples], dtype=np.int64)
        splits[split] = FolderSplit(split, folder, PackedNames(name for name, _ in samples), labels, classes)
    source = ImageSource(path=folder, kind="Birdsnap", splits=splits, classes=classes)
    return Birdsnap(source=source, missing={split: tuple(sorted(names)) for split, names in missing.items()})
