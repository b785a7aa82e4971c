"""Recognises what a path holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from dataset_tools.formats.manifest import is_converted
from dataset_tools.progress import waiting
from dataset_tools.sources.cifar import open_cifar
from dataset_tools.sources.converted import open_converted
from dataset_tools.sources.ilsvrc import open_any_tar, open_ilsvrc_folder
from dataset_tools.sources.image_folder import open_image_folder
from dataset_tools.sources.parquet import open_parquet
from dataset_tools.sources.split import ImageSource
from dataset_tools.sources.stl10 import open_stl10

logger = logging.getLogger(__name__)

ALLOWED = (
    "a folder [train/|val/|test/|unlabeled/]CLASS/name.jpg, a tar of one (plain, .gz, .bz2, .xz), webdataset's tars "
    "(one, or a folder), a folder of one tar for each class, what convert made, "
    "ImageNet's tars (a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and its labels, or one of them) "
    "or Kaggle's ILSVRC/ tree, Parquet files with an image column (one, or a folder), or a folder with CIFAR-10, "
    "CIFAR-100 or STL-10 files"
)
Opener = Callable[[Path], ImageSource | None]
"""Opens what it recognises, and gives None for anything else."""
PUBLISHED: tuple[Opener, ...] = (open_cifar, open_stl10)
FOLDERS: tuple[Opener, ...] = (open_ilsvrc_folder, open_parquet, open_image_folder)
FILES: tuple[Opener, ...] = (open_parquet, open_any_tar)
"""The input formats; the last of each takes whatever the others do not, or says what is wrong with it."""
PUBLISHED_FOLDERS = (
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
    "cifar-100-binary",
    "cifar-100-python",
    "stl10_binary",
)
"""What the published archives unpack to; the folder around one of these is as good."""


def open_source(path: str | os.PathLike[str], *, quietly: bool = False) -> ImageSource:
    """Opens any source of images, and says how it is understood and what of it is not read, unless `quietly`.

    Raises FileNotFoundError if there is nothing at `path`, ValueError if it is nothing that can be read as
    images, OSError if it cannot be read at all, RuntimeError if a package is missing that would read it; the
    message says what to do.
    """
    place = Path(path).expanduser()
    with nullcontext() if quietly else waiting(f"reading what is in {place}"):
        source = _open(place)
    if not quietly and os.environ.get("RANK", "0") == "0":
        for line in source.describe():
            logger.info("%s", line)
        for note in source.account.notes:
            logger.warning("warning: %s", note)
    return source


def _open(place: Path) -> ImageSource:
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {place}. Give the path of {ALLOWED}.")
    if place.is_dir():
        if is_converted(place):
            return open_converted(place)
        if place.name.endswith(".partial") and (place / "journal.json").is_file():
            raise ValueError(
                f"{place} is an unfinished conversion. Give the convert command that began it again: it continues, and "
                f"the data set is then called {place.name.removesuffix('.partial')}"
            )
        openers = _open_published, *FOLDERS
    elif place.is_file():
        if is_converted(place.parent):
            raise ValueError(f"{place} is a file of the converted data set {place.parent}: give that folder.")
        openers = FILES
    else:
        raise ValueError(f"{place} is neither a file nor a folder. Give the path of {ALLOWED}.")
    source = next(source for opener in openers if (source := opener(place)))
    assert source is not None
    return source


def _open_published(place: Path) -> ImageSource | None:
    candidates = [place, *(place / name for name in PUBLISHED_FOLDERS)]
    found = [source for folder in candidates for opener in PUBLISHED if (source := opener(folder))]
    if len(found) > 1:
        choices = ", ".join(str(source.path) for source in found)
        raise ValueError(f"{place} holds several data sets; give one of {choices}.")
    return found[0] if found else None
